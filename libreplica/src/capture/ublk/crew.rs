//! The threads of all queues of a device. All or none serve it: the kernel takes a device as
//! one whose server died when one of its queues' threads ends. They are called together
//! first, each with its lane, and then take their queues all at once.
//!
//! They also end together. Each exits first, and its ring is closed then, as it is when a
//! process dies: where the thread that took requests lives on, the driver of kernel 6.12 now
//! and then loses some that were on their way, and their users wait for ever.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use crate::capture::ublk::host::{Host, block_node};
use crate::capture::ublk::queue::{Ending, Order, Orders, Post, Queue, open_lane};
use crate::capture::ublk::transfers::Supply;
use crate::error::{Error, ErrorKind, IoContext, Result};
use crate::sys::ublk::{Device, DeviceNumber, QueueNumber};
use crate::sys::uring::Wake;

const OPERATION: &str = "serve a ublk device";

/// A thread of the crew has ended: in order, or for what reason.
#[derive(Debug)]
pub(super) struct Report(pub Result<Ending, String>);

/// The threads.
#[derive(Debug)]
pub(super) struct Crew {
    threads: Vec<JoinHandle<Option<Queue>>>,
    /// Each waits for the file that it is to serve.
    files: Vec<Sender<Arc<File>>>,
    answers: Receiver<Result<()>>,
    host: Arc<Host>,
    number: DeviceNumber,
    wakes: Vec<Wake>,
    orders: Arc<Orders>,
}

impl Crew {
    /// Calls the threads together, for a device that they are to serve. Each will `report`
    /// its end, once it has served.
    pub fn call<M: From<Report> + Send + 'static>(
        host: &Arc<Host>,
        supply: &Supply,
        device: &Device,
        reports: &Sender<M>,
    ) -> Result<Self> {
        let node = &block_node(device.number);
        let (ready, answers) = channel();
        let mut crew = Self {
            threads: Vec::new(),
            files: Vec::new(),
            answers,
            host: Arc::clone(host),
            number: device.number,
            wakes: Vec::new(),
            orders: Arc::default(),
        };
        for queue in 0..device.queues {
            let post = Post {
                queue: QueueNumber(queue),
                depth: device.depth,
                orders: Arc::clone(&crew.orders),
                wake: Wake::new().at(OPERATION, node)?,
                granted: device.features,
                supply: supply.clone(),
            };
            crew.wakes.push(post.wake.clone());
            let (file, files) = channel();
            crew.files.push(file);
            let (ready, reports) = (ready.clone(), reports.clone());
            let name = format!("ublk{}-{queue}", device.number);
            let builder = std::thread::Builder::new().name(name);
            let thread = builder.spawn(move || work(post, &files, &ready, &reports));
            crew.threads.push(thread.at("start a thread", node)?);
        }
        crew.all_answer()?;
        Ok(crew)
    }

    /// Lets them serve the device behind `file`, /dev/ublkcN: returns when each has taken its
    /// queue.
    pub fn serve(&self, file: File) -> Result<()> {
        let file = Arc::new(file);
        for thread in &self.files {
            let _ = thread.send(Arc::clone(&file));
        }
        self.all_answer()
    }

    fn all_answer(&self) -> Result<()> {
        let answers = self.answers.iter().take(self.threads.len());
        answers.fold(Ok(()), Result::and)
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
        self.files.clear();
        for thread in self.threads.drain(..) {
            // With its ring.
            drop(thread.join());
        }
        self.host.wait_until_released(self.number);
    }
}

/// A thread's life; what is left of its queue.
fn work<M: From<Report>>(
    post: Post,
    files: &Receiver<Arc<File>>,
    ready: &Sender<Result<()>>,
    reports: &Sender<M>,
) -> Option<Queue> {
    let (lane, way) = match guarded(|| open_lane(&post)) {
        Ok(opened) => opened,
        Err(error) => {
            let _ = ready.send(Err(error));
            return None;
        }
    };
    let _ = ready.send(Ok(()));
    let file = files.recv().ok()?;
    let mut queue = match guarded(|| Queue::take(lane, way, file, post)) {
        Ok(queue) => queue,
        Err(error) => {
            let _ = ready.send(Err(error));
            return None;
        }
    };
    let _ = ready.send(Ok(()));
    let served = guarded(|| queue.serve());
    // Waits for what was begun on the disk: only then may another begin the same again.
    let finished = guarded(|| queue.finish());
    let ending = served.and_then(|ending| finished.map(|()| ending));
    let _ = reports.send(M::from(Report(ending.map_err(|error| error.to_string()))));
    Some(queue)
}

/// Does it; a panic is an error as well.
fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        let what = format!("a thread panicked: {}", text.as_deref().unwrap_or("?"));
        Err(Error::new(ErrorKind::State, OPERATION).detail(what))
    })
}
