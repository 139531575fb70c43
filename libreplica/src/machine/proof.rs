//! What a drill has shown of a recovery point: kept beside it, and told by `replica points`.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How a drill ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "lowercase")]
pub enum Verdict {
    /// The machine gave its sign of life.
    Alive,
    /// It ran, and gave none in time.
    Silent,
    /// It ended before it gave one.
    Ended {
        /// QEMU's exit code; null if a signal ended it.
        code: Option<i32>,
    },
}

impl Verdict {
    /// One word.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Alive => "alive",
            Self::Silent => "silent",
            Self::Ended { .. } => "ended",
        }
    }

    /// Whether the point is proven by it.
    pub const fn is_alive(&self) -> bool {
        matches!(self, Self::Alive)
    }
}

/// What a drill has shown of a point; as JSON in the store, and in what commands print.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Proof {
    /// When the drill ended, RFC 3339.
    pub time: String,
    /// How.
    #[serde(flatten)]
    pub verdict: Verdict,
    /// How long the machine ran until then, in seconds.
    pub seconds: f64,
    /// What it was called.
    pub machine: String,
    /// What was waited for.
    pub waited_for: String,
    /// How many bytes came from its console; not all of them need to be kept.
    pub console_bytes: u64,
}

impl Proof {
    /// `seconds` of a duration, to the millisecond.
    pub fn seconds(duration: Duration) -> f64 {
        (duration.as_secs_f64() * 1000.0).round() / 1000.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_reads_as_it_was_written() {
        for (verdict, part) in [
            (Verdict::Alive, r#""verdict":"alive""#),
            (Verdict::Silent, r#""verdict":"silent""#),
            (
                Verdict::Ended { code: Some(1) },
                r#""verdict":"ended","code":1"#,
            ),
            (
                Verdict::Ended { code: None },
                r#""verdict":"ended","code":null"#,
            ),
        ] {
            let proof = Proof {
                time: "2026-11-22T05:00:00Z".into(),
                verdict,
                seconds: Proof::seconds(Duration::from_micros(12_345_678)),
                machine: "db1".into(),
                waited_for: "console: ready".into(),
                console_bytes: 17,
            };
            let text = serde_json::to_string(&proof).unwrap();
            assert!(text.contains(part) && text.contains("12.346"), "{text}");
            assert_eq!(serde_json::from_str::<Proof>(&text).unwrap(), proof);
        }
    }
}
