//! P: what the work on an attempt stands on.

use std::sync::Arc;

use alloy_shared::env::Env;
use alloy_shared::limits::Limits;

use crate::hooks::Hooks;
use crate::session::Inputs;
use crate::sources::Sources;
use crate::spool::Spool;
use crate::upstream::Upstream;
use crate::vm_pool::VmPool;

pub struct Ctx {
    pub env: Arc<dyn Env>,
    pub limits: Limits,
    pub pool: Arc<VmPool>,
    pub spool: Arc<Spool>,
    pub sources: Arc<Sources>,
    pub upstream: Arc<dyn Upstream>,
    pub inputs: Inputs,
    pub hooks: Arc<Hooks>,
    /// What the job is told about where it runs.
    pub worker_name: String,
}
