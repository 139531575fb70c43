//! The table in docs/failover.md says what the state machine does, row by row, and nothing else.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use libreplica::failover::{Event, State, step};

fn documented() -> Vec<String> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/failover.md");
    let text = std::fs::read_to_string(path).unwrap();
    let table = text.split("<!-- steps -->").nth(1).unwrap();
    let rows = table.lines().filter(|line| line.starts_with("| `"));
    rows.map(str::to_owned).collect()
}

/// `TakeLock` as people write it: `take lock`.
fn words(name: &str) -> String {
    let mut words = String::new();
    for c in name.chars() {
        if c.is_uppercase() && !words.is_empty() {
            words.push(' ');
        }
        words.extend(c.to_lowercase());
    }
    words
}

fn built() -> Vec<String> {
    let mut rows = Vec::new();
    for state in State::ALL {
        for event in Event::ALL {
            let Ok(step) = step(state, event) else {
                continue;
            };
            let actions: Vec<String> = step
                .actions
                .iter()
                .map(|action| {
                    let name = words(&format!("{action:?}"));
                    if action.is_durable() {
                        format!("**{name}**")
                    } else {
                        name
                    }
                })
                .collect();
            rows.push(format!(
                "| `{state}` | {event} | `{}` | {} |",
                step.next,
                actions.join(", ")
            ));
        }
    }
    rows
}

#[test]
fn the_table_is_what_the_machine_does() {
    let (documented, built) = (documented(), built());
    assert!(built.len() > 15);
    for row in &built {
        assert!(documented.contains(row), "not in the table:\n{row}");
    }
    for row in &documented {
        assert!(built.contains(row), "only in the table:\n{row}");
    }
    assert_eq!(documented, built, "in another order");
}
