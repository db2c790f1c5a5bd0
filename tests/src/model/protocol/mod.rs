//! The lease, attempt and log protocol, explored to the end: one job, two workers, two attempts, two log bytes each.
//!
//! What decides is the product: both cores of a session, the desk with `job::apply`, the store's guards, the stored logs,
//! the spool's judgement at a restart. The model adds what lies between them: a network that loses, repeats and reorders,
//! processes that die, connections that are cut, workers that are called silent at any moment, a command in its VM, and
//! the glue that stands for `session::drive` and `ops::job::settle`.

pub mod books;
pub mod ends;
pub mod io;
pub mod rules;
pub mod sights;
pub mod state;
pub mod step;

use std::sync::Arc;

use alloy_shared::wire::session::{LogChunk, Report, ToOrchestrator, ToWorker};
use orchestrator::job::Event;
use orchestrator::session::core::Core as ServerCore;
use stateright::{Model, Property};

use super::Seen;
use super::mutant::Mutant;
use super::pool::{Identity, Pool};
use books::{Ask, Books, Done};
use ends::Daemon;
use state::{Action, Budget, Farm, Log, Memory, Run, Worker};

/// What travels on a session's socket.
#[derive(Debug, Clone, PartialEq)]
pub enum Text {
    Down(ToWorker),
    Up(ToOrchestrator),
    Log(LogChunk),
}

/// What the model looks up or has computed by the product.
#[derive(Debug, Default)]
pub struct Known {
    pub books: Pool<Books>,
    pub daemons: Pool<Daemon>,
    pub cores: Pool<ServerCore>,
    pub texts: Pool<Text>,
    pub reports: Pool<Report>,
    pub events: Pool<Event>,
    asked: Pool<(u32, Done), (u32, Ask)>,
    worker_steps: Pool<io::WorkerStep, (u32, io::WorkerInput, u8)>,
    server_steps: Pool<io::ServerStep, (u32, io::ServerInput, u8, u8)>,
    appends: Pool<(Log, io::Stored), (Log, u8, Vec<u8>)>,
    event_of: Pool<u32, (u32, u8)>,
    hellos: Pool<Option<(u32, u32)>, (u32, u8)>,
}

/// How far the model goes. Within it every order of events is explored.
#[derive(Debug, Clone, Copy)]
pub struct Bound {
    pub messages: usize,
    pub budget: Budget,
}

impl Bound {
    pub const SMALL: Self = Self { messages: 3, budget: Budget { misfortunes: 1, crashes: 1, cancels: 1, beats: 0 } };
    /// A minute of a program that is not optimised.
    pub const TINY: Self = Self { messages: 3, budget: Budget { misfortunes: 1, crashes: 1, cancels: 0, beats: 0 } };
    pub const LARGE: Self = Self { messages: 3, budget: Budget { misfortunes: 2, crashes: 1, cancels: 1, beats: 1 } };
}

impl Bound {
    /// As far as a mutant must go to be noticed.
    pub fn of(mutant: Mutant) -> Self {
        let (misfortunes, cancels, beats) = match mutant {
            Mutant::CancelLost => (1, 1, 0),
            Mutant::SilenceBelieved => (2, 0, 1),
            _ => (2, 0, 0),
        };
        Self { messages: 3, budget: Budget { misfortunes, crashes: 1, cancels, beats } }
    }
}

#[derive(Debug, Clone)]
pub struct Protocol {
    pub known: Arc<Known>,
    pub bound: Bound,
    pub mutant: Option<Mutant>,
    pub seen: Arc<Seen>,
}

impl Protocol {
    pub fn new(bound: Bound, mutant: Option<Mutant>) -> Self {
        Self { known: Arc::default(), bound, mutant, seen: Arc::default() }
    }

    fn is(&self, mutant: Mutant) -> bool {
        self.mutant == Some(mutant)
    }

    fn start(&self) -> Farm {
        let books = self.known.books.put(Identity::of(&Books::default()), Books::default());
        let daemon = Daemon::start(Vec::new());
        let core = self.known.daemons.put(daemon.identity(), daemon);
        let worker = Worker { core, link: None, leased: false, spool: [None; 2], runs: [Run::Nothing; 2] };
        Farm {
            books,
            logs: [Log::default(); 2],
            sessions: [None; 2],
            old: Vec::new(),
            workers: [worker; 2],
            net: Vec::new(),
            left: self.bound.budget,
            memory: Memory::default(),
            settling: None,
            unwritten: None,
        }
    }
}

impl Model for Protocol {
    type State = Farm;
    type Action = Action;

    fn init_states(&self) -> Vec<Farm> {
        let connected = [0, 1]
            .into_iter()
            .fold(self.start(), |farm, w| self.step(&farm, &Action::Connect(w)).expect("a worker connects"));
        vec![connected]
    }

    fn actions(&self, farm: &Farm, actions: &mut Vec<Action>) {
        rules::actions(self, farm, actions);
    }

    fn next_state(&self, farm: &Farm, action: Action) -> Option<Farm> {
        self.step(farm, &action).filter(|next| next != farm)
    }

    fn within_boundary(&self, farm: &Farm) -> bool {
        farm.net.len() <= self.bound.messages
    }

    fn properties(&self) -> Vec<Property<Self>> {
        rules::properties()
    }
}
