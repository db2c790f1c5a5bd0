//! S: a Postgres of the test run's own: no port, gone with the process that started it. Tests have one without disk syncs.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use orchestrator::store::sql::SqlStore;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};
use tokio::sync::OnceCell;

mod own;

pub use own::Own;

static SERVER: OnceCell<Server> = OnceCell::const_new();

struct Server {
    dir: PathBuf,
    /// The server ends when this one's stdin does: also when the test process is killed. Absent: another process keeps it.
    _keeper: Option<Child>,
}

const MISSING: &str = "PostgreSQL's server programs are missing: install the package `postgresql` \
    (Debian: apt-get install postgresql; macOS: brew install postgresql@17), or set PGBIN to their directory";

/// Nothing of a test's has to outlive a power cut.
const FORGETFUL: &str = "-c fsync=off -c synchronous_commit=off -c full_page_writes=off";

/// Sets up, starts, says `ready`, waits for the end of stdin, takes down. As root the server runs as `postgres`.
const KEEPER: &str = r#"
set -eu
trap '' INT
d=$1; bin=$2; how=$3; as=
if [ "$(id -u)" = 0 ]; then
    chown postgres "$d"
    as="setpriv --reuid=postgres --regid=postgres --init-groups"
fi
cd "$d"
run() { $as "$@" </dev/null >"$d/talk" 2>&1 || { cat "$d/talk"; rm -rf "$d"; exit 1; }; }
run "$bin/initdb" -D "$d/data" -U postgres -A trust --no-sync -E UTF8 --locale=C
run "$bin/pg_ctl" -D "$d/data" -w -t 60 -l "$d/server" start -o "-c listen_addresses='' -c unix_socket_directories=$d -c max_connections=300 $how"
echo ready
cat >/dev/null || true
run "$bin/pg_ctl" -D "$d/data" -m immediate -w stop
rm -rf "$d"
"#;

/// The address of a new database with the farm's schema.
pub async fn database() -> String {
    let server = server().await;
    let name = unused();
    server.admin(&format!("CREATE DATABASE {name} TEMPLATE farm")).await.expect("copy the template");
    server.url(&name)
}

/// The address of a new database with nothing in it.
pub async fn empty_database() -> String {
    let server = server().await;
    let name = unused();
    server.admin(&format!("CREATE DATABASE {name}")).await.expect("make a database");
    server.url(&name)
}

/// Keeps one server for other processes, which find it by `ALLOY_TEST_PG`, until stdin ends.
pub async fn keep() -> std::io::Result<()> {
    println!("{}", server().await.dir.display());
    std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink()).map(drop)
}

/// A server whose commits reach the disk, with the settings that it comes with: for measuring.
pub struct Lasting(Server);

impl Lasting {
    pub fn start() -> Self {
        Self(start(""))
    }

    /// The address of a new database with nothing in it.
    pub async fn database(&self) -> Result<String, sqlx::Error> {
        let name = unused();
        self.0.admin(&format!("CREATE DATABASE {name}")).await?;
        Ok(self.0.url(&name))
    }

    /// Settles what was written until now, so that whoever comes next does not pay for it.
    pub async fn settle(&self) -> Result<(), sqlx::Error> {
        self.0.admin("CHECKPOINT").await
    }
}

/// A name for a database. Many processes share one server, and a long run uses a process's number twice.
fn unused() -> String {
    format!("t_{:032x}", rand::random::<u128>())
}

async fn server() -> &'static Server {
    SERVER
        .get_or_init(|| async {
            if let Some(dir) = std::env::var_os("ALLOY_TEST_PG") {
                return Server { dir: dir.into(), _keeper: None };
            }
            let server = start(FORGETFUL);
            // Sorts as people's databases do, not by bytes: what depends on the order of letters must show here.
            let icu = "CREATE DATABASE farm TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'en-US'";
            if server.admin(icu).await.is_err() {
                server.admin("CREATE DATABASE farm").await.expect("make the template");
            }
            let store = SqlStore::open_postgres(&server.url("farm")).await.expect("open the template");
            store.close().await;
            server
        })
        .await
}

fn start(how: &str) -> Server {
    let bin = programs().unwrap_or_else(|| panic!("{MISSING}"));
    // A socket's path must be short.
    let dir = tempfile::Builder::new().prefix("alloy-pg").tempdir_in("/tmp").expect("make a directory").keep();
    // It outlives this process by a moment: what it says then goes where nobody waits for its end.
    let complaints = std::fs::File::create(dir.join("keeper")).expect("make a file");
    let mut keeper = Command::new("sh")
        .args(["-c", KEEPER, "sh"])
        .args([&dir, &bin])
        .arg(how)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(complaints)
        .spawn()
        .expect("start sh");
    let mut said = String::new();
    let mut out = BufReader::new(keeper.stdout.take().expect("a pipe"));
    while out.read_line(&mut said).expect("read from sh") > 0 {
        if said.ends_with("ready\n") {
            return Server { dir, _keeper: Some(keeper) };
        }
    }
    let ended = keeper.wait();
    panic!("Postgres did not start ({ended:?}): {said}");
}

fn programs() -> Option<PathBuf> {
    let mut places: Vec<PathBuf> = std::env::var_os("PGBIN").map(PathBuf::from).into_iter().collect();
    if let Ok(out) = Command::new("pg_config").arg("--bindir").output() {
        places.push(PathBuf::from(String::from_utf8_lossy(&out.stdout).trim()));
    }
    for root in ["/usr/lib/postgresql", "/opt/homebrew/opt", "/usr/local/opt"] {
        let versions = std::fs::read_dir(root).into_iter().flatten().flatten();
        let mut found: Vec<PathBuf> = versions.map(|entry| entry.path().join("bin")).collect();
        found.sort();
        places.extend(found.into_iter().rev());
    }
    places.into_iter().find(|bin: &PathBuf| is_file(&bin.join("initdb")) && is_file(&bin.join("pg_ctl")))
}

fn is_file(path: &Path) -> bool {
    path.is_file()
}

impl Server {
    fn url(&self, database: &str) -> String {
        format!("postgres://postgres@localhost/{database}?host={}", self.dir.display())
    }

    async fn admin(&self, text: &str) -> Result<(), sqlx::Error> {
        let mut conn = PgConnection::connect(&self.url("postgres")).await?;
        conn.execute(AssertSqlSafe(text.to_owned())).await?;
        conn.close().await
    }
}
