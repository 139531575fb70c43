//! The threads of all queues of a device. All or none serve it: the kernel takes a device as
//! one whose server died when one of its queues' threads ends.

use std::any::Any;
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use crate::capture::inline::Entrance;
use crate::capture::ublk::queue::{Ending, Order, Orders, Post, Queue};
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::ublk::{Device, QueueNumber};
use crate::sys::uring::Wake;

const OPERATION: &str = "serve a ublk device";

/// A thread of the crew has ended: in order, or for what reason.
#[derive(Debug)]
pub(super) struct Report(pub Result<Ending, String>);

/// The threads.
#[derive(Debug)]
pub(super) struct Crew {
    threads: Vec<JoinHandle<()>>,
    wakes: Vec<Wake>,
    orders: Arc<Orders>,
}

impl Crew {
    /// Starts the threads, and returns when each has taken its queue. Each will `report` its
    /// end.
    pub fn muster<M: From<Report> + Send + 'static>(
        entrance: &Entrance,
        device: &Device,
        file: File,
        node: &Path,
        reports: &Sender<M>,
    ) -> Result<Self> {
        let mut crew = Self {
            threads: Vec::new(),
            wakes: Vec::new(),
            orders: Arc::default(),
        };
        let file = Arc::new(file);
        let (ready, readiness) = channel();
        let mut mustered = Ok(());
        for queue in 0..device.queues {
            let post = Post {
                file: Arc::clone(&file),
                queue: QueueNumber(queue),
                depth: device.depth,
                orders: Arc::clone(&crew.orders),
                wake: Wake::new().at(OPERATION, node)?,
            };
            crew.wakes.push(post.wake.clone());
            let (entrance, ready, reports) = (entrance.clone(), ready.clone(), reports.clone());
            let name = format!("ublk{}-{queue}", device.number);
            let builder = std::thread::Builder::new().name(name);
            let thread = builder.spawn(move || work(&entrance, post, &ready, &reports));
            match thread.at("start a thread", node) {
                Ok(thread) => crew.threads.push(thread),
                Err(error) => mustered = Err(error),
            }
        }
        // One of each, whatever it is.
        for answer in readiness.iter().take(crew.threads.len()) {
            mustered = mustered.and(answer);
        }
        mustered.map(|()| crew)
    }

    /// Gives all threads an order.
    pub fn order(&self, order: Order) {
        self.orders.give(order);
        self.wakes.iter().for_each(Wake::wake);
    }

    /// Orders one thread to fail.
    pub fn fail_one(&self) {
        self.orders.give(Order::Fail);
        if let Some(wake) = self.wakes.last() {
            wake.wake();
        }
    }

    /// Lets the threads end what they have begun, and waits until they have gone: then the
    /// kernel knows that the device has no server.
    pub fn dismiss(self) {}
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.order(Order::Leave);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A thread's life.
fn work<M: From<Report>>(
    entrance: &Entrance,
    post: Post,
    ready: &Sender<Result<()>>,
    reports: &Sender<M>,
) {
    let taken = catch_unwind(AssertUnwindSafe(|| Queue::take(entrance, post)));
    let taken = taken.unwrap_or_else(|panic| {
        Err(Error::new(ErrorKind::State, OPERATION).detail(said(panic.as_ref())))
    });
    let mut queue = match taken {
        Ok(queue) => {
            let _ = ready.send(Ok(()));
            queue
        }
        Err(error) => {
            let _ = ready.send(Err(error));
            return;
        }
    };
    let served = catch_unwind(AssertUnwindSafe(|| queue.serve()));
    let report = match served {
        Ok(Ok(ending)) => Ok(ending),
        Ok(Err(error)) => Err(error.to_string()),
        Err(panic) => Err(said(panic.as_ref())),
    };
    // Waits for what it has begun on the disk: only then may another begin the same again.
    if catch_unwind(AssertUnwindSafe(|| drop(queue))).is_err() {
        tracing::error!("a queue of a ublk device did not end in order");
    }
    let _ = reports.send(M::from(Report(report)));
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned());
    format!("a thread panicked: {}", text.as_deref().unwrap_or("?"))
}
