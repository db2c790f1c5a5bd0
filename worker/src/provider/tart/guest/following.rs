use std::pin::pin;
use std::sync::Mutex;

use alloy_shared::env::{Ms, Now};
use futures_util::future::BoxFuture;
use futures_util::poll;

use super::*;

/// A world in which time stands still and tasks are only noted.
#[derive(Default)]
struct Noted(Mutex<Vec<&'static str>>);

#[async_trait]
impl Env for Noted {
    fn now(&self) -> Now {
        Now { wall: Ms(0), mono: Mono(0) }
    }
    async fn sleep_until(&self, _: Mono) {
        std::future::pending().await
    }
    fn spawn(&self, name: &'static str, _: BoxFuture<'static, ()>) {
        self.0.lock().unwrap().push(name);
    }
    fn dice(&self) -> u64 {
        0
    }
}

/// The other ends of a follower whose command prints and whose output has room for one chunk.
struct Ends {
    noted: Arc<Noted>,
    said: mpsc::Sender<Said>,
    orders: mpsc::Sender<ExecInput>,
    output: mpsc::Receiver<ExecOutput>,
    ended: watch::Sender<Option<VmError>>,
}

fn follower() -> (Follower, Ends) {
    let noted = Arc::new(Noted::default());
    let (said, hears) = mpsc::channel(CHUNKS);
    let (input, orders) = mpsc::channel(4);
    let (bytes, output) = mpsc::channel(1);
    let (vm, ended) = watch::channel(None);
    let running = Running {
        said: hears,
        unmark: Unmark::new(Mark::new(0)),
        lost: None,
        _stop: CancellationToken::new().drop_guard(),
    };
    let follower = Follower {
        env: Arc::clone(&noted) as _,
        way: Way::Agent(PathBuf::from("/nowhere")),
        group: "group".into(),
        running,
        orders,
        output: bytes,
        ended,
    };
    (follower, Ends { noted, said, orders: input, output, ended: vm })
}

fn chunk(text: &'static [u8]) -> ExecOutput {
    ExecOutput::Bytes(Bytes::from_static(text))
}

#[tokio::test]
async fn a_command_whose_output_nobody_takes_is_told_what_it_is_ordered() {
    let (follower, mut ends) = follower();
    for text in [&b"one"[..], b"two", b"three"] {
        ends.said.try_send(Said::Bytes(Bytes::from_static(text))).unwrap();
    }
    let mut follows = pin!(follower.follow());
    assert!(poll!(&mut follows).is_pending());
    ends.orders.try_send(ExecInput::Signal(Signal::Term)).unwrap();
    assert!(poll!(&mut follows).is_pending());
    assert_eq!(*ends.noted.0.lock().unwrap(), ["guest_signal"]);
    ends.ended.send_replace(Some(VmError::farm(VmFault::Lost, "the VM ended")));
    assert!(poll!(&mut follows).is_pending());
    for text in [&b"one"[..], b"two", b"three"] {
        assert_eq!(ends.output.try_recv().unwrap(), chunk(text), "all that was printed comes before the end");
        assert!(poll!(&mut follows).is_pending() || text == b"three");
    }
    let end = ends.output.try_recv().unwrap();
    assert!(matches!(&end, ExecOutput::Lost(error) if error.tail == "the VM ended"), "{end:?}");
}

#[tokio::test]
async fn all_that_a_command_printed_comes_in_order_before_its_end() {
    let (follower, mut ends) = follower();
    for text in [&b"one"[..], b"two", b"three\x1ealloy-end-0000000000000000:7\n"] {
        ends.said.try_send(Said::Bytes(Bytes::from_static(text))).unwrap();
    }
    let read = async {
        let mut all = Vec::new();
        while let Some(output) = ends.output.recv().await {
            all.push(output);
        }
        all
    };
    let (_, all) = tokio::join!(follower.follow(), read);
    assert_eq!(all, [chunk(b"one"), chunk(b"two"), chunk(b"three"), ExecOutput::Exit(Exit::Code(7))]);
}
