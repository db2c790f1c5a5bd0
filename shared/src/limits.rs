//! T: every bound and deadline, with its reason. Durations are milliseconds, sizes are bytes.

/// The farm's timing. One value for both daemons, so that the lease inequality can be checked in one place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// A worker says that it lives, ± 10 %.
    pub heartbeat_ms: u64,
    /// A worker kills its VMs this long after the send time of its last acknowledged heartbeat.
    pub self_fence_ms: u64,
    /// From the decision to kill a VM until it is surely dead.
    pub kill_budget_ms: u64,
    /// The orchestrator calls a silent worker lost.
    pub expiry_ms: u64,
    /// Nobody counts as silent this soon after the orchestrator started.
    pub startup_grace_ms: u64,
    /// Slack between the worker's fence and the orchestrator's expiry: clocks run at slightly different speeds.
    pub lease_margin_ms: u64,
    /// A connection on which nothing was heard is dead.
    pub link_silent_ms: u64,
    pub reconnect_base_ms: u64,
    pub reconnect_cap_ms: u64,
    /// The cap while an attempt is held: its lease runs.
    pub reconnect_cap_held_ms: u64,
    pub connect_timeout_ms: u64,
    /// A worker answers an assignment, or the job goes elsewhere.
    pub accept_ms: u64,
    pub boot_ms: u64,
    /// A claim waits for its VM: one that did not come in time, its end, and another one.
    pub claim_ms: u64,
    /// A slot or a host that failed several times in a row rests for so long.
    pub quarantine_ms: u64,
    /// A download that makes no progress for this long is broken off; what it has stays for the next try.
    pub pull_stall_ms: u64,
    /// Between two tries to bring an image that did not come, doubled with each, up to the cap.
    pub pull_retry_ms: u64,
    pub pull_retry_cap_ms: u64,
    /// A registry's refusal is believed for this long.
    pub pull_refused_ms: u64,
    /// The longest that an attempt waits for its image.
    pub image_ms: u64,
    /// A guest that answers by SSH this long, and not by its agent, has none.
    pub agent_grace_ms: u64,
    pub stage_source_ms: u64,
    pub collect_ms: u64,
    /// An operator's hook around a job.
    pub hook_ms: u64,
    /// The hook after a job that was taken from this worker, or that it hands back: shorter than a daemon's stop.
    pub hook_hurried_ms: u64,
    /// SIGTERM to SIGKILL.
    pub cancel_grace_ms: u64,
    pub job_timeout_ms: u64,
    pub job_timeout_max_ms: u64,
    pub queue_timeout_ms: u64,
    /// The orchestrator ends a job by itself this long after the worker should have.
    pub backstop_ms: u64,
    pub warm_age_max_ms: u64,
    /// Requeues of a job that the farm lost, before the next loss ends it as errored.
    pub lost_max: u32,
    /// The same while a worker is there that has not lost it: one that so many hosts lost is a danger to the others.
    pub lost_hosts_max: u32,
    /// A worker that drains gives its jobs this long before it hands them back.
    pub drain_ms: u64,
    /// Daemons wait this long for tasks after a stop signal.
    pub stop_ms: u64,
    /// A cross-process poll floor under every wake-up.
    pub poll_floor_ms: u64,
    /// A lost attempt's log still takes its worker's tail for this long.
    pub late_tail_ms: u64,
    /// Below this many free bytes a daemon takes nothing new.
    pub disk_floor: u64,
    /// How long a command waits on a full disk before the middle of its log is left out: the farm may take what is spooled,
    /// or somebody may free space.
    pub log_pressure_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            heartbeat_ms: 5_000,
            self_fence_ms: 40_000,
            kill_budget_ms: 10_000,
            expiry_ms: 60_000,
            startup_grace_ms: 60_000,
            lease_margin_ms: 10_000,
            link_silent_ms: 25_000,
            reconnect_base_ms: 500,
            reconnect_cap_ms: 15_000,
            reconnect_cap_held_ms: 3_000,
            connect_timeout_ms: 5_000,
            accept_ms: 10_000,
            boot_ms: 120_000,
            claim_ms: 360_000,
            quarantine_ms: 60_000,
            pull_stall_ms: 600_000,
            pull_retry_ms: 10_000,
            pull_retry_cap_ms: 600_000,
            pull_refused_ms: 600_000,
            image_ms: 3 * 60 * 60_000,
            agent_grace_ms: 20_000,
            stage_source_ms: 600_000,
            collect_ms: 600_000,
            hook_ms: 60_000,
            hook_hurried_ms: 4_000,
            cancel_grace_ms: 10_000,
            job_timeout_ms: 60 * 60_000,
            job_timeout_max_ms: 24 * 60 * 60_000,
            queue_timeout_ms: 24 * 60 * 60_000,
            backstop_ms: 60_000,
            warm_age_max_ms: 4 * 60 * 60_000,
            lost_max: 2,
            lost_hosts_max: 5,
            drain_ms: 60 * 60_000,
            stop_ms: 10_000,
            poll_floor_ms: 2_000,
            late_tail_ms: 600_000,
            disk_floor: DISK_FLOOR,
            log_pressure_ms: 30_000,
        }
    }
}

impl Limits {
    /// Checks what the protocol's safety rests on. The text says which numbers do not fit together.
    pub fn validate(&self) -> Result<(), String> {
        let fenced = self.self_fence_ms + self.kill_budget_ms + self.lease_margin_ms;
        if fenced > self.expiry_ms {
            return Err(format!(
                "self_fence {} ms + kill_budget {} ms + margin {} ms is more than expiry {} ms: two VMs of one job could live at once",
                self.self_fence_ms, self.kill_budget_ms, self.lease_margin_ms, self.expiry_ms
            ));
        }
        if self.heartbeat_ms * 3 > self.self_fence_ms {
            return Err(format!(
                "heartbeat {} ms leaves fewer than three tries before the self-fence at {} ms",
                self.heartbeat_ms, self.self_fence_ms
            ));
        }
        if self.lost_hosts_max < self.lost_max {
            return Err(format!(
                "lost_hosts_max {} is less than lost_max {}: a worker that has not lost a job would shorten its life",
                self.lost_hosts_max, self.lost_max
            ));
        }
        Ok(())
    }

    /// The longest that a job may ask to wait.
    pub fn queue_timeout_max_ms(&self) -> u64 {
        7 * self.queue_timeout_ms
    }

    /// A worker that missed three heartbeats is named as not heard.
    pub fn suspect_ms(&self) -> u64 {
        3 * self.heartbeat_ms
    }

    /// What runs already may go on to here, so that it can end: below it the bytes of logs and artifacts are refused too, and
    /// what is left is for the books.
    pub fn disk_reserve(&self) -> u64 {
        self.disk_floor / 2
    }

    /// The lease timings and the pauses between downloads divided by `factor`, so that tests see hours of protocol in seconds. Deadlines that users set stay.
    pub fn scaled(factor: u64) -> Self {
        let base = Self::default();
        let f = factor.max(1);
        Self {
            heartbeat_ms: base.heartbeat_ms / f,
            self_fence_ms: base.self_fence_ms / f,
            kill_budget_ms: base.kill_budget_ms / f,
            expiry_ms: base.expiry_ms / f,
            startup_grace_ms: base.startup_grace_ms / f,
            lease_margin_ms: base.lease_margin_ms / f,
            link_silent_ms: base.link_silent_ms / f,
            reconnect_base_ms: base.reconnect_base_ms / f,
            reconnect_cap_ms: base.reconnect_cap_ms / f,
            reconnect_cap_held_ms: base.reconnect_cap_held_ms / f,
            connect_timeout_ms: base.connect_timeout_ms / f,
            // A machine may stall for longer than a scaled second. Below the fence: after it the lease ends anyway.
            accept_ms: (base.accept_ms / f).max(5_000).min(base.expiry_ms / f / 2),
            boot_ms: base.boot_ms / f,
            claim_ms: base.claim_ms / f,
            quarantine_ms: base.quarantine_ms / f,
            pull_stall_ms: base.pull_stall_ms / f,
            pull_retry_ms: base.pull_retry_ms / f,
            pull_retry_cap_ms: base.pull_retry_cap_ms / f,
            pull_refused_ms: base.pull_refused_ms / f,
            agent_grace_ms: base.agent_grace_ms / f,
            log_pressure_ms: base.log_pressure_ms / f,
            ..base
        }
    }
}

// Sizes and counts are protocol facts: both sides must agree, so they are constants.

/// A JSON body other than a source. Specs are small.
pub const JSON_BODY_MAX: u64 = 1 << 20;
/// Any JSON answer; the longest lists half a million digests.
pub const JSON_ANSWER_MAX: usize = 64 << 20;
/// An error's body, as far as it is read.
pub const PROBLEM_MAX: usize = 64 << 10;
/// One line of the feed. The last one holds the whole job.
pub const FEED_LINE_MAX: usize = 8 << 20;
/// A frame on the worker's socket.
pub const FRAME_MAX: usize = 1 << 20;
/// A job's spec as the farm writes it: with what else an assignment says it fits into a frame.
pub const SPEC_MAX: usize = FRAME_MAX - (64 << 10);
/// A sentence about what went wrong.
pub const MESSAGE_MAX: usize = 2_000;
/// WebSocket buffers per connection: default ones cost 131 KiB an idle worker, these cost 6.
pub const SOCKET_BUFFER: usize = 4 << 10;
/// One log chunk on any hop.
pub const LOG_CHUNK_MAX: usize = 64 << 10;
/// Un-acknowledged log bytes in flight per attempt: a disk that syncs in 10 ms does not hold up a flood.
pub const LOG_WINDOW: u64 = 8 << 20;
/// A file of a worker's spooled log: small enough that a flood uses the same memory again and again.
pub const SPOOL_SEGMENT: u64 = 8 << 20;
/// Log that the farm has and the spool keeps all the same: an orchestrator whose disk was put back gets it again.
pub const SPOOL_KEEP: u64 = 64 << 20;
const _: () = assert!(SPOOL_KEEP >= LOG_WINDOW);
/// Stored log per attempt: head, then a marker, then the last `LOG_TAIL`.
pub const LOG_CAP: u64 = 1 << 30;
pub const LOG_TAIL: u64 = 1 << 20;
/// Newest bytes of one log that are kept in memory, in so many chunks, and of all logs together.
pub const LOG_RING: u64 = 4 << 20;
pub const LOG_RING_CHUNKS: usize = 4_096;
pub const LOG_RINGS_MAX: u64 = 256 << 20;
/// The same of one log whose bytes are in a database.
pub const LOG_RING_SHARED: u64 = 1 << 20;
/// A log whose rows in the database hold so much is moved to an object.
pub const LOG_OBJECT_MIN: u64 = 4 << 20;
/// Log files that the orchestrator holds open while nobody waits for their sync.
pub const LOG_FILES_OPEN: usize = 512;
/// One blob. Larger files are several.
pub const BLOB_MAX: usize = 8 << 20;
/// Files above `BLOB_MAX` are cut into pieces of this size.
pub const BLOB_PIECE: usize = 4 << 20;
/// Raw bytes that one pack frame holds before it is closed.
pub const FRAME_TARGET: usize = 1 << 20;
/// A pack in one request.
pub const PACK_MAX: u64 = 512 << 20;
pub const MANIFEST_ENTRIES_MAX: usize = 500_000;
/// Half a million files with paths of 100 characters take 120 MB.
pub const MANIFEST_BYTES_MAX: usize = 128 << 20;
pub const SOURCE_BYTES_MAX: u64 = 64 << 30;
/// Bytes of a path, and of what a link leads to.
pub const PATH_MAX: usize = 1024;
pub const PATH_DEPTH_MAX: usize = 64;
/// Expanded bytes per stored byte, above which an archive counts as a bomb. Checked past the first MiB.
pub const RATIO_MAX: u64 = 1_000;
/// Archives that are read at once. Each holds a thread, and its manifest in memory.
pub const ARCHIVE_READERS: usize = 8;
/// What stands in an archive's extended headers, each: paths, times, attributes.
pub const ARCHIVE_HEADER_MAX: u64 = 1 << 20;
/// Digests in one question to the store.
pub const DIGESTS_PER_READ: usize = 4_096;
/// Bytes of all manifests that are taken at once: each lies in memory, with about twice as much for its entries.
pub const MANIFESTS_BYTES: usize = 256 << 20;
/// Rows of one upload in one commit: the next one lets others' writes in between.
pub const BLOBS_PER_COMMIT: usize = DIGESTS_PER_READ;
/// After a refusal so many more bytes of the upload are taken and dropped, because many clients read no answer before
/// they have sent everything.
pub const UPLOAD_DRAIN: u64 = 16 << 20;
pub const COMMAND_MAX: usize = 128 << 10;
pub const ARGV_MAX: usize = 4_096;
/// What a hook may say into the worker's log, and a line of it.
pub const HOOK_WORDS_MAX: usize = 64 << 10;
pub const HOOK_LINE_MAX: usize = 1 << 10;
/// Ranges that a job may be let through to. A packet filter takes 4096 rules.
pub const NETWORK_RANGES_MAX: usize = 64;
pub const ENV_COUNT_MAX: usize = 256;
pub const ENV_BYTES_MAX: usize = 128 << 10;
pub const ARTIFACT_RULES_MAX: usize = 64;
/// `{` in one such rule. They may stand in each other, each as three levels of an expression of 250.
pub const RULE_BRACES_MAX: usize = 64;
/// Things that are named because a rule takes them and they are no artifacts. Of the others there is a number.
pub const UNFIT_NAMED_MAX: usize = 100;
/// Warnings at one job's end: one for each rule and for each thing that is named, how many things are not, and a cut log.
pub const WARNINGS_MAX: usize = ARTIFACT_RULES_MAX + UNFIT_NAMED_MAX + 2;
pub const ARTIFACTS_MAX: usize = 10_000;
/// Entries of a workspace that are looked at to find a job's artifacts.
pub const WORKSPACE_ENTRIES_MAX: usize = 1_000_000;
pub const ARTIFACT_BYTES_MAX: u64 = 16 << 30;
/// Objects on one page of a list of them.
pub const BLOBS_PER_PAGE: usize = 1_000;
/// What goes to an object store at once, how many such parts of one object, and how many artifacts.
pub const S3_PART: usize = 8 << 20;
pub const S3_PARTS_AT_ONCE: usize = 2;
pub const S3_PARTS_MAX: u64 = 10_000;
pub const S3_UPLOADS: usize = 8;
/// One request to an object store, and the silence within its answer's body.
pub const S3_REQUEST_MS: u64 = 60_000;
pub const S3_IDLE_MS: u64 = 20_000;
/// A request that an object store did not do is tried so often; none is begun after this time. The pause doubles from the first.
pub const S3_TRIES: u32 = 8;
pub const S3_BUDGET_MS: u64 = 60_000;
pub const S3_PAUSE_MS: u64 = 100;
pub const S3_PAUSE_MAX_MS: u64 = 5_000;
/// How long the link to an object opens it.
pub const S3_LINK_S: u64 = 15 * 60;
/// Uploads to an object store that are remembered as whole until somebody registers them.
pub const S3_DONE_MAX: usize = 256;
/// A hundred years.
pub const KEEP_DAYS_MAX: u32 = 36_500;
pub const RETRIES_MAX: u32 = 10;
pub const IDEMPOTENCY_KEY_MAX: usize = 128;
/// Live jobs in one farm: a submit beyond it is answered 429.
pub const LIVE_JOBS_MAX: usize = 200_000;
pub const PAGE_MAX: u32 = 200;
/// Slots of one worker.
pub const SLOTS_MAX: usize = 64;
/// VMs that run at once on a Mac: its licence and its kernel allow two macOS guests, whoever starts them.
pub const MACOS_GUESTS_MAX: usize = 2;
/// A process that was killed may leave its lock to a child for a moment: so often, and so long apart, it is tried again.
pub const LOCK_TRIES: u32 = 30;
pub const LOCK_PAUSE_MS: u64 = 100;
/// Requests for VMs that a worker remembers, to know which images to keep warm.
pub const DEMAND_MAX: usize = 256;
/// Images that a worker keeps warm by its configuration.
pub const FLOORS_MAX: usize = 16;
/// Faults of a host in a row after which it takes no jobs.
pub const HOST_FAULTS_MAX: u32 = 3;
/// How often a VM is told to go before its host asks for a reboot.
pub const STUCK_TRIES_MAX: u32 = 3;
/// What a worker says of its host's trouble, in bytes.
pub const TROUBLE_MAX: usize = 400;
/// How often workers may hand a job back whose command they did not begin, before it counts as lost.
pub const HANDED_BACK_MAX: u32 = 16;
/// Images that the farm has wishes about, and that one worker reports.
pub const IMAGES_MAX: usize = 256;
/// Attempts of one worker that are not yet closed on both sides.
pub const HELD_MAX: usize = 256;
/// Requests that may wait at the desk; the door blocks beyond it.
pub const DESK_QUEUE: usize = 8_192;
/// Groups in one commit.
pub const COMMIT_GROUPS_MAX: usize = 2_048;
/// Groups that are written by one set of statements.
pub const COMMIT_TOGETHER_MAX: usize = 512;
/// Connections that read a SQLite file, and all connections to a Postgres.
pub const STORE_READERS: u32 = 4;
pub const STORE_CONNECTIONS: u32 = 16;
/// SQLite waits for another process's lock; a read waits for its answer; a commit of all its groups for its own.
pub const STORE_BUSY_MS: u64 = 5_000;
pub const STORE_READ_MS: u64 = 10_000;
/// A start waits so long for a Postgres to answer. Once it runs nobody does: it is away, and must be noticed soon when it is back.
pub const STORE_OPEN_MS: u64 = 10_000;
pub const STORE_CONNECT_MS: u64 = 2_000;
pub const STORE_COMMIT_MS: u64 = 30_000;
/// Fan-out: a follower's share of the sending window, and the window's cap.
pub const FAN_OUT_US_PER_FOLLOWER: u64 = 32;
pub const FAN_OUT_CAP_MS: u64 = 100;
/// A follower without progress is cut after this; its cursor lets it come back.
pub const FOLLOWER_STUCK_MS: u64 = 60_000;
/// A token that was looked up is believed this long: the longest that a revoked one still opens a door.
pub const TOKEN_CACHE_MS: u64 = 1_000;
pub const TOKEN_CACHE_MAX: usize = 10_000;
/// Calls of one token: far above what a busy CLI or CI needs, far below what hurts its neighbours.
pub const TOKEN_CALLS_PER_S: f64 = 2_000.0;
pub const TOKEN_CALLS_BURST: f64 = 4_000.0;
/// A sign-in token is refused unread above this; the keys that sign them are refused above that.
pub const SIGN_IN_TOKEN_MAX: usize = 8_192;
pub const SIGN_IN_KEYS_MAX: usize = 256 * 1_024;
/// Clocks of two services differ: a sign-in token may come from so far in the future.
pub const SIGN_IN_LEEWAY_S: i64 = 60;
/// The sign-in service's keys are believed so long, asked for again no sooner than that, and waited for so long.
pub const SIGN_IN_KEYS_FRESH_MS: u64 = 600_000;
pub const SIGN_IN_KEYS_AGAIN_MS: u64 = 30_000;
pub const SIGN_IN_KEYS_WAIT_MS: u64 = 5_000;
/// With no key at all, an answer that failed is asked for again this soon.
pub const SIGN_IN_KEYS_FIRST_MS: u64 = 1_000;
/// Wrong credentials of one peer.
pub const GUESSES_PER_MINUTE: f64 = 10.0;
/// Keys that a rate limit remembers before it drops those that are at rest.
pub const THROTTLE_KEYS_MAX: usize = 10_000;
/// Connections to the orchestrator; the next one waits.
pub const CONNECTIONS_MAX: usize = 16_384;
/// Files that the orchestrator has open in full use: connections, logs, and the rest.
pub const OPEN_FILES: u64 = CONNECTIONS_MAX as u64 + LOG_FILES_OPEN as u64 + 2_048;
/// A request's head arrives within this, its body never pauses longer, and an answer of JSON is ready within that.
pub const HEAD_READ_MS: u64 = 10_000;
pub const BODY_IDLE_MS: u64 = 30_000;
pub const JSON_ANSWER_MS: u64 = 30_000;
/// A silent stream says that it lives.
pub const KEEP_ALIVE_MS: u64 = 10_000;
/// `?wait=terminal` ends after this, whatever the job does.
pub const WAIT_MAX_MS: u64 = 24 * 60 * 60_000;
/// Frames between a session and its socket, each way.
pub const SOCKET_QUEUE: usize = 16;
/// The last frames of a session that is over have this long to leave.
pub const SOCKET_GOODBYE_MS: u64 = 2_000;
pub const JOIN_TTL_S: u64 = 24 * 3600;
/// [`Limits::disk_floor`] of a daemon that is told nothing else: room for the database to grow by while somebody frees space.
pub const DISK_FLOOR: u64 = 1 << 30;

/// A daemon's own log file before it begins a new one, and how many full ones it keeps.
pub const DAEMON_LOG_BYTES: u64 = 16 << 20;
pub const DAEMON_LOGS: u32 = 4;
/// One question to a program of the host that tells how it is set up.
pub const HOST_ASK_MS: u64 = 5_000;
pub const HOST_ANSWER_MAX: usize = 4 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_defaults_and_their_scaled_forms_are_safe() {
        Limits::default().validate().unwrap();
        for factor in [2, 5, 10, 20] {
            let scaled = Limits::scaled(factor);
            scaled.validate().unwrap();
            assert!(scaled.accept_ms < scaled.self_fence_ms, "{factor}");
        }
        assert_eq!(Limits::scaled(1), Limits::default());
    }

    #[test]
    fn a_fence_later_than_the_expiry_is_refused() {
        let limits = Limits { self_fence_ms: 45_000, ..Limits::default() };
        assert!(limits.validate().unwrap_err().contains("two VMs"));
    }
}
