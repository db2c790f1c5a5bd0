use std::pin::pin;
use std::sync::Mutex;

use alloy_shared::env::{Ms, Now};
use futures_util::future::BoxFuture;
use futures_util::poll;

use super::*;

/// A world in which no task ever comes to its turn, and so no guest says a word.
#[derive(Default)]
struct Still(Mutex<Vec<BoxFuture<'static, ()>>>);

#[async_trait]
impl Env for Still {
    fn now(&self) -> Now {
        Now { wall: Ms(0), mono: Mono(0) }
    }
    async fn sleep_until(&self, _: Mono) {
        std::future::pending().await
    }
    fn spawn(&self, _: &'static str, task: BoxFuture<'static, ()>) {
        self.0.lock().unwrap().push(task);
    }
    fn dice(&self) -> u64 {
        0
    }
}

#[test]
fn what_may_take_long_takes_as_long_as_its_stage_may() {
    let text = String::new;
    let about =
        About { os: GuestOs::Linux, user: text(), home: text(), path: text(), tmp: text(), inbox: "/inbox".into() };
    let guest = TartGuest {
        env: Arc::<Still>::default(),
        way: Way::Agent(PathBuf::from("/nowhere")),
        about,
        workspace: "/work".into(),
        ended: watch::channel(None).1,
        commands: AtomicU32::new(0),
        booted: BootTimes::default(),
    };
    let rules = crate::artifacts::parse(&["**".to_owned()]).unwrap();
    // Whoever sets an alarm here panics: there is no clock.
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let (mut unpack, mut list) = (pin!(guest.unpack("s.tar", "")), pin!(guest.list(&rules)));
        assert!(poll!(&mut unpack).is_pending() && poll!(&mut list).is_pending());
    });
}
