//! The clerk: the one thread of a server that asks what changed since a point. The answer is
//! in the store, which may be slow, or hang: then whoever asked waits, for nothing but the
//! answer. What a client reads and writes goes on, on the same connection too; and a server
//! that ends does not wait for its clerk.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use crate::capture::inline::Errno;
use crate::capture::nbd::contexts::{Context, Contexts, HowMany, NoContexts, Stretches};
use crate::capture::nbd::requests::Tag;
use crate::sys::uring::Wake;
use crate::units::Extent;

/// How often whoever waits for names looks whether there is still a use for them.
const LOOK: Duration = Duration::from_millis(50);

enum Question {
    Names(SyncSender<Vec<String>>),
    Status(Query, Weak<Desk>),
}

/// A request for block status.
#[derive(Clone, Debug)]
pub(super) struct Query {
    pub tag: Tag,
    /// Those that the client has chosen.
    pub contexts: Arc<[Context]>,
    pub extent: Extent,
    pub many: HowMany,
}

/// What is to be said to it.
#[derive(Debug)]
pub(super) struct Answer {
    pub tag: Tag,
    /// Of each context in turn.
    pub found: Result<Vec<Stretches>, Errno>,
}

impl Query {
    /// The answer, if the store need not be asked for it.
    pub fn at_once(&self) -> Option<Answer> {
        let is_known = |context: &Context| matches!(context, Context::Allocation);
        let all = self.contexts.iter().all(is_known);
        all.then(|| self.answer(&NoContexts))
    }

    fn answer(&self, contexts: &dyn Contexts) -> Answer {
        let found = self.contexts.iter().map(|context| {
            let stretches = context.stretches(contexts, self.extent, self.many);
            stretches.map_err(|error| {
                tracing::warn!(%error, "block status cannot be told");
                Errno::of(&error)
            })
        });
        Answer {
            tag: self.tag,
            found: found.collect(),
        }
    }
}

/// Where a connection finds its answers.
#[derive(Debug)]
pub(super) struct Desk {
    answers: Mutex<Vec<Answer>>,
    wake: Wake,
}

impl Desk {
    /// An empty one.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            answers: Mutex::default(),
            wake: Wake::new()?,
        })
    }

    /// Can be slept on until there are answers.
    pub fn wake_file(&self) -> Arc<OwnedFd> {
        self.wake.file()
    }

    /// Those that have come.
    pub fn take(&self) -> Vec<Answer> {
        std::mem::take(&mut *self.answers.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn put(&self, answer: Answer) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.push(answer);
        drop(answers);
        self.wake.wake();
    }
}

/// The way to the thread. It ends when this is dropped, and with its last answer.
#[derive(Debug)]
pub(super) struct Clerk {
    questions: Sender<Question>,
}

impl Clerk {
    /// Starts the thread, which asks `contexts`.
    pub fn start(contexts: Arc<dyn Contexts>) -> std::io::Result<Self> {
        let (questions, asked) = channel();
        let thread = std::thread::Builder::new().name("nbd-clerk".into());
        thread.spawn(move || answer_all(&asked, contexts.as_ref()))?;
        Ok(Self { questions })
    }

    /// Has `query` answered, sooner or later, at `desk`; says whether it will be.
    pub fn ask(&self, query: Query, desk: &Arc<Desk>) -> bool {
        let question = Question::Status(query, Arc::downgrade(desk));
        self.questions.send(question).is_ok()
    }

    /// The names that changes are known since; none if there is no use for them any more,
    /// which `waits` says, before they are known.
    pub fn names(&self, waits: impl Fn() -> bool) -> Vec<String> {
        let (answer, names) = sync_channel(1);
        if self.questions.send(Question::Names(answer)).is_err() {
            return Vec::new();
        }
        loop {
            match names.recv_timeout(LOOK) {
                Ok(names) => return names,
                Err(RecvTimeoutError::Timeout) if waits() => {}
                Err(_) => {
                    tracing::warn!("recovery points cannot be named to an NBD client in time");
                    return Vec::new();
                }
            }
        }
    }
}

fn answer_all(asked: &Receiver<Question>, contexts: &dyn Contexts) {
    for question in asked {
        match question {
            Question::Names(answer) => {
                // Who asked may have gone.
                let _ = answer.try_send(contexts.list());
            }
            Question::Status(query, desk) => {
                if desk.strong_count() == 0 {
                    continue;
                }
                let answer = query.answer(contexts);
                if let Some(desk) = desk.upgrade() {
                    desk.put(answer);
                }
            }
        }
    }
}
