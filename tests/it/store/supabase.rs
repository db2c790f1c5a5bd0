//! T: `supabase/` is what the orchestrator has, either may come first, and every policy holds.
//!
//! A Postgres with the roles, the functions and the habits of a Supabase project stands in for one.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use alloy_tests::pg;
use orchestrator::store::Scope;
use orchestrator::store::Store as _;
use orchestrator::store::sql::{SqlStore, postgres_migrations};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, Row};

use super::given::{insert, job_id, queued};
use super::put;
use crate::tidy::scan::{files_below, root};

/// When each migration came to Supabase, by its version here. A later one gets a later stamp: its CLI applies none before
/// the newest that it knows.
const STAMPS: &[(i64, &str)] = &[
    (1, "20261122000001"),
    (2, "20261122000002"),
    (3, "20261122000003"),
    (1000, "20261122000004"),
    (1001, "20261122000005"),
    (1002, "20261122000006"),
    (4, "20261122001001"),
    (1003, "20261122001002"),
    (1010, "20261122001004"),
];

fn dir() -> PathBuf {
    root().join("supabase")
}

/// A migration of the orchestrator's as Supabase applies it: once, whoever comes first, with the books of both kept.
fn as_supabase_has_it(migration: &sqlx::migrate::Migration) -> String {
    let (version, name, text) = (migration.version, &migration.description, migration.sql.as_str());
    assert!(!text.contains("$migration$") && !text.contains("$alloy$"));
    let checksum = migration.checksum.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    });
    format!(
        "-- Made from the orchestrator's migration {version} ({name}); ALLOY_TEST_BLESS=1 makes it anew. It does nothing if the\n\
         -- orchestrator was there before, and leaves its bookkeeping for it if it was not.\n\
         CREATE TABLE IF NOT EXISTS _sqlx_migrations (\n    version BIGINT PRIMARY KEY,\n    description TEXT NOT NULL,\n    \
         installed_on TIMESTAMPTZ NOT NULL DEFAULT now(),\n    success BOOLEAN NOT NULL,\n    checksum BYTEA NOT NULL,\n    \
         execution_time BIGINT NOT NULL\n);\n\
         DO $alloy$\nBEGIN\nIF EXISTS (SELECT FROM _sqlx_migrations WHERE version = {version}) THEN\n    RETURN;\nEND IF;\n\
         EXECUTE $migration$\n{text}$migration$;\n\
         INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)\n    \
         VALUES ({version}, '{name}', TRUE, '\\x{checksum}', 0);\nEND\n$alloy$;\n"
    )
}

#[test]
fn the_migrations_of_supabase_are_the_orchestrators() {
    assert!(STAMPS.is_sorted_by_key(|(_, stamp)| stamp), "a later one gets a later stamp");
    for migration in postgres_migrations() {
        let stamp = STAMPS.iter().find(|(version, _)| *version == migration.version);
        let (_, stamp) = stamp.unwrap_or_else(|| panic!("migration {} needs a stamp", migration.version));
        let path = dir().join(format!("migrations/{stamp}_{}.sql", migration.description));
        let made = as_supabase_has_it(&migration);
        if std::env::var_os("ALLOY_TEST_BLESS").is_some() {
            fs::write(&path, made).unwrap();
            continue;
        }
        let told = fs::read_to_string(&path).unwrap_or_default();
        assert!(told == made, "{} is not what the orchestrator has (ALLOY_TEST_BLESS=1 writes it)", path.display());
    }
    let made = files("migrations").into_iter().filter(|(_, text)| text.starts_with("-- Made from")).count();
    assert_eq!(made, STAMPS.len(), "a file without a migration");
    for (name, _) in files("migrations") {
        let (stamp, _) = name.split_once('_').unwrap();
        assert!(stamp.len() == 14 && stamp.bytes().all(|c| c.is_ascii_digit()), "{name}: no stamp");
    }
}

/// The `.sql` files below a directory of `supabase/`, in the order of their names.
fn files(below: &str) -> Vec<(String, String)> {
    let mut paths = files_below(&dir().join(below), ".sql");
    paths.sort();
    let name = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().to_owned();
    paths.iter().map(|path| (name(path), fs::read_to_string(path).unwrap())).collect()
}

/// What a Supabase project has before anybody does anything, as far as it matters here.
const PROJECT: &str = r#"
DO $$
DECLARE made record;
BEGIN
    FOR made IN SELECT * FROM (VALUES ('anon', 'NOLOGIN NOINHERIT'), ('authenticated', 'NOLOGIN NOINHERIT'),
        ('service_role', 'NOLOGIN NOINHERIT BYPASSRLS'), ('project', 'LOGIN CREATEROLE')) AS role (name, options) LOOP
        BEGIN
            EXECUTE format('CREATE ROLE %I %s', made.name, made.options);
        EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
        END;
    END LOOP;
END
$$;
GRANT anon, authenticated, service_role TO project;
CREATE SCHEMA extensions;
GRANT USAGE ON SCHEMA extensions TO anon, authenticated, service_role;
GRANT ALL ON SCHEMA extensions TO project;
GRANT USAGE ON SCHEMA public TO anon, authenticated, service_role;
CREATE SCHEMA auth;
GRANT USAGE ON SCHEMA auth TO anon, authenticated, service_role, project;
CREATE FUNCTION auth.jwt() RETURNS jsonb LANGUAGE sql STABLE
    AS $$ SELECT nullif(current_setting('request.jwt.claims', true), '')::jsonb $$;
CREATE FUNCTION auth.uid() RETURNS uuid LANGUAGE sql STABLE AS $$ SELECT (auth.jwt() ->> 'sub')::uuid $$;
ALTER DEFAULT PRIVILEGES FOR ROLE project IN SCHEMA public GRANT ALL ON TABLES TO anon, authenticated, service_role;
ALTER DEFAULT PRIVILEGES FOR ROLE project IN SCHEMA public GRANT ALL ON FUNCTIONS TO anon, authenticated, service_role;
"#;

/// A new project: its address for the role that owns it, which is no superuser.
async fn project() -> String {
    let root = pg::empty_database().await;
    let mut conn = PgConnection::connect(&root).await.unwrap();
    sqlx::raw_sql(PROJECT).execute(&mut conn).await.unwrap();
    let name: String = sqlx::query_scalar("SELECT current_database()").fetch_one(&mut conn).await.unwrap();
    let own = format!(
        "ALTER DATABASE {name} OWNER TO project; ALTER DATABASE {name} SET search_path = \"$user\", public, extensions"
    );
    sqlx::raw_sql(AssertSqlSafe(own)).execute(&mut conn).await.unwrap();
    let url = root.replace("//postgres@", "//project@");
    let mut conn = PgConnection::connect(&url).await.unwrap();
    (&mut conn).execute("CREATE PUBLICATION supabase_realtime").await.unwrap();
    url
}

/// `supabase db push`: each file that was not applied yet, in a transaction of its own.
async fn push(url: &str) {
    let mut conn = PgConnection::connect(url).await.unwrap();
    let books = "CREATE SCHEMA IF NOT EXISTS supabase_migrations; \
        CREATE TABLE IF NOT EXISTS supabase_migrations.schema_migrations (version TEXT PRIMARY KEY)";
    sqlx::raw_sql(books).execute(&mut conn).await.unwrap();
    for (name, text) in files("migrations") {
        let (version, _) = name.split_once('_').unwrap();
        let mut tx = conn.begin().await.unwrap();
        let insert = "INSERT INTO supabase_migrations.schema_migrations VALUES ($1) ON CONFLICT DO NOTHING";
        let new = sqlx::query(insert).bind(version).execute(&mut *tx).await.unwrap().rows_affected();
        if new == 1 {
            let applied = sqlx::raw_sql(AssertSqlSafe(text)).execute(&mut *tx).await;
            applied.unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        tx.commit().await.unwrap();
    }
}

/// The orchestrator starts, works, and stops. `n` names its job.
async fn work(url: &str, n: usize) {
    let store = SqlStore::open_postgres(url).await.unwrap();
    put(&store, insert(queued(job_id(n)), None)).await.unwrap();
    let found = store.live(None, 9).await.unwrap();
    assert!(found.iter().any(|job| job.id == job_id(n)), "the owner is not held back");
    assert!(store.job(&Scope::farm(), &job_id(n)).await.unwrap().is_some());
    store.close().await;
}

const CATALOG: &str = r"
SELECT 'column ' || concat_ws(' ', table_schema, table_name, column_name, data_type, is_nullable, column_default) AS what
    FROM information_schema.columns WHERE table_schema IN ('public', 'alloy_views')
UNION ALL SELECT concat_ws(' ', 'constraint', conrelid::regclass, conname, pg_get_constraintdef(oid))
    FROM pg_constraint WHERE connamespace = 'public'::regnamespace
UNION ALL SELECT 'index ' || indexdef FROM pg_indexes WHERE schemaname = 'public'
UNION ALL SELECT concat_ws(' ', 'view', viewname, definition) FROM pg_views WHERE schemaname IN ('public', 'alloy_views')
UNION ALL SELECT concat_ws(' ', 'relation', oid::regclass, relkind, relrowsecurity, reloptions, relacl)
    FROM pg_class WHERE relnamespace IN ('public'::regnamespace, 'alloy_views'::regnamespace)
UNION ALL SELECT concat_ws(' ', 'policy', tablename, policyname, permissive, roles, cmd, qual, with_check) FROM pg_policies
UNION ALL SELECT concat_ws(' ', 'published', pubname, tablename) FROM pg_publication_tables
UNION ALL SELECT concat_ws(' ', 'applied', version, description, success, encode(checksum, 'hex')) FROM _sqlx_migrations
ORDER BY what";

async fn catalog(url: &str) -> Vec<String> {
    let mut conn = PgConnection::connect(url).await.unwrap();
    sqlx::query_scalar(CATALOG).fetch_all(&mut conn).await.unwrap()
}

#[tokio::test]
async fn the_orchestrator_and_supabase_may_come_in_either_order() {
    let (first, second) = (project().await, project().await);
    push(&first).await;
    work(&first, 1).await;
    push(&first).await;
    work(&first, 2).await;

    work(&second, 1).await;
    push(&second).await;
    work(&second, 2).await;
    push(&second).await;

    let (a, b) = (catalog(&first).await, catalog(&second).await);
    assert!(a.len() > 200, "{}", a.len());
    for what in a.iter().chain(&b) {
        assert!(a.contains(what) && b.contains(what), "only one of both has: {what}");
    }
}

#[tokio::test]
async fn without_supabase_row_level_security_is_on_and_every_view_answers() {
    let mut conn = PgConnection::connect(&pg::database().await).await.unwrap();
    let open = "SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') \
        AND NOT relrowsecurity";
    let open: Vec<String> = sqlx::query_scalar(open).fetch_all(&mut conn).await.unwrap();
    assert!(open.is_empty(), "a migration for Postgres has to switch row-level security on for {open:?}");
    let views = "SELECT viewname::text FROM pg_views WHERE schemaname = 'alloy_views'";
    let views: Vec<String> = sqlx::query_scalar(views).fetch_all(&mut conn).await.unwrap();
    assert!(views.len() >= 8, "{views:?}");
    for view in views {
        (&mut conn).execute(AssertSqlSafe(format!("SELECT * FROM alloy_views.{view}"))).await.unwrap();
    }
}

#[tokio::test]
async fn every_policy_holds() {
    let url = project().await;
    push(&url).await;
    let seed = fs::read_to_string(dir().join("seed.sql")).unwrap();
    let mut conn = PgConnection::connect(&url).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(seed)).execute(&mut conn).await.unwrap();
    (&mut conn).execute("DELETE FROM members").await.unwrap();
    let tests = files("tests");
    assert!(tests.len() >= 2);
    for (name, text) in tests {
        let rows = sqlx::raw_sql(AssertSqlSafe(text)).fetch_all(&mut conn).await;
        let rows = rows.unwrap_or_else(|error| panic!("{name}: {error}"));
        let lines: Vec<String> = rows.iter().filter_map(|row| row.try_get::<String, _>(0).ok()).collect();
        let said = lines.join("\n");
        let plan = lines.iter().find_map(|line| line.strip_prefix("1..")).unwrap_or_else(|| panic!("{name}: no plan"));
        let passed = lines.iter().filter(|line| line.starts_with("ok ")).count();
        let failed = lines.iter().any(|line| line.starts_with("not ok ") || line.starts_with("# Looks like"));
        assert!(!failed && passed.to_string() == plan, "{name}: {passed} of {plan}\n{said}");
        println!("{name}: {passed} pgTAP tests passed");
    }
}

#[test]
fn the_settings_for_the_cli_are_whole() {
    let text = fs::read_to_string(dir().join("config.toml")).unwrap();
    for said in ["project_id = \"alloy\"", "major_version = 15", "sql_paths = [\"./seed.sql\"]", "\"alloy_views\""] {
        assert!(text.contains(said), "{said}");
    }
}
