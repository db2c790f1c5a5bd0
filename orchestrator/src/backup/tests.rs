use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use alloy_shared::env::Ms;
use alloy_shared::id::{AttemptRef, DEFAULT_ORG, JobId};
use alloy_shared::runtime::{Lifecycle, SystemEnv};
use alloy_shared::secret::Secret;
use bytes::Bytes;
use futures_util::StreamExt as _;

use super::list::{LIST, ListError};
use super::restore::{RestoreError, restore};
use super::*;
use crate::blobs::{BlobKey, Blobs, Fs};
use crate::config::S3;
use crate::logs::{Files, Logs};
use crate::moving::{self, Counts, MoveError, To};
use crate::store::sql::{DataLock, SqlStore};
use crate::store::{Blob, BlobKind, Group, Place, Store as _, Write};

const NOW: Ms = Ms(1_000_000);
const AT: AttemptRef = AttemptRef { job: JobId::from_raw(7), attempt: 1 };

/// A farm with one object that its database names, a sealed log, one that grows, and a token.
async fn farm(dir: &Path) -> PathBuf {
    let farm = dir.join("data/farm");
    let _lock = DataLock::acquire(&farm).unwrap();
    let store = SqlStore::open_sqlite(&farm.join(DATABASE)).await.unwrap();
    let blobs = Blobs::Fs(Fs::open(farm.join("blobs"), NOW, 0).await.unwrap());
    let (digest, body) = (Digest::of(b"artifact"), Bytes::from_static(b"artifact"));
    let key = BlobKey::alone(DEFAULT_ORG, BlobKind::Artifact, &digest);
    let body = futures_util::stream::iter([Ok(body)]).boxed();
    blobs.put(&key, body, Some(digest)).await.unwrap();
    let row = Blob {
        org: DEFAULT_ORG,
        kind: BlobKind::Artifact,
        digest,
        size: 8,
        place: Place::Alone { object: key.to_string() },
        created_at: NOW,
        used_at: NOW,
    };
    store.commit(&[Group(vec![Write::AddBlobs(vec![row])])]).await.unwrap();
    let logs = Logs::Files(Files::open(farm.join("logs"), 0).unwrap());
    logs.append(&AT, 0, Bytes::from_static(b"sealed")).await.unwrap();
    logs.seal(&AT).await.unwrap();
    let grows = AttemptRef { attempt: 2, ..AT };
    logs.append(&grows, 0, Bytes::from_static(b"grows")).await.unwrap();
    fs::write(farm.join("admin.token"), "alloy_pat_x\n").unwrap();
    store.close().await;
    farm
}

async fn take(farm: &Path, target: &Path, at: String) -> Result<Taken, BackupError> {
    super::take(farm, target, at, &CancellationToken::new()).await
}

async fn taken(dir: &Path) -> (PathBuf, PathBuf, Taken) {
    let (farm, target) = (farm(dir).await, dir.join("backup"));
    let taken = take(&farm, &target, "2026-01-02T03:04:05Z".into()).await.unwrap();
    (farm, target, taken)
}

#[tokio::test]
async fn what_was_backed_up_comes_back_to_the_last_byte() {
    let dir = tempfile::tempdir().unwrap();
    let (farm, target, taken) = taken(dir.path()).await;
    assert_eq!((taken.files, taken.missing.len()), (6, 0), "{taken:?}");
    let elsewhere = dir.path().join("new/farm");
    let restored = restore(&target, &elsewhere, NOW).await.unwrap();
    assert_eq!((restored.files, restored.bytes), (taken.files, taken.bytes));
    for name in ["logs/{job}/1.log", "logs/{job}/1.seal", "logs/{job}/2.log", "admin.token"] {
        let name = name.replace("{job}", &AT.job.to_string());
        assert_eq!(fs::read(elsewhere.join(&name)).unwrap(), fs::read(farm.join(&name)).unwrap(), "{name}");
    }
    let _lock = DataLock::acquire(&elsewhere).unwrap();
    let store = SqlStore::open_sqlite(&elsewhere.join(DATABASE)).await.unwrap();
    let digest = Digest::of(b"artifact");
    let rows = store.blobs(&crate::store::Scope::farm(), BlobKind::Artifact, &[digest]).await.unwrap();
    let Place::Alone { object } = &rows[0].place else { panic!("{rows:?}") };
    let key = BlobKey::parse(object).unwrap();
    let blobs = Blobs::Fs(Fs::open(elsewhere.join("blobs"), NOW, 0).await.unwrap());
    let read: Vec<_> = blobs.read(&key, 0..8).await.unwrap().map(Result::unwrap).collect().await;
    assert_eq!(read.concat(), b"artifact");
    assert!(fs::read_dir(dir.path()).unwrap().all(|left| !left.unwrap().file_name().to_string_lossy().contains('.')));
}

#[tokio::test]
async fn a_backup_is_refused_where_something_is_and_where_no_farm_is() {
    let dir = tempfile::tempdir().unwrap();
    let (farm, target, _) = taken(dir.path()).await;
    let again = |farm: PathBuf, to: PathBuf| async move { take(&farm, &to, String::new()).await.unwrap_err() };
    assert!(matches!(again(farm.clone(), target).await, BackupError::Exists(_)));
    assert!(matches!(again(dir.path().join("none"), dir.path().join("b")).await, BackupError::NoFarm(_)));
    let part = dir.path().join("c.partial");
    let busy = Part::begin(&dir.path().join("c")).unwrap();
    assert!(matches!(again(farm.clone(), dir.path().join("c")).await, BackupError::Busy(_)));
    drop(busy);
    // What a backup left that was cut off.
    fs::create_dir_all(part.join("logs/x")).unwrap();
    fs::write(part.join(DATABASE), "half").unwrap();
    take(&farm, &dir.path().join("c"), String::new()).await.unwrap();
    assert!(!part.exists() && !dir.path().join("c/logs/x").exists());
}

#[tokio::test]
async fn a_restore_takes_no_backup_that_is_cut_off_damaged_or_too_new() {
    let dir = tempfile::tempdir().unwrap();
    let (_, target, _) = taken(dir.path()).await;
    let new = dir.path().join("new/farm");
    let refused = async || restore(&target, &new, NOW).await.unwrap_err();
    let list = fs::read_to_string(target.join(LIST)).unwrap();
    for cut in [0, 1, list.len() / 2, list.len() - 1] {
        fs::write(target.join(LIST), &list[..cut]).unwrap();
        assert!(matches!(refused().await, RestoreError::List { error: ListError::Damaged, .. }), "{cut}");
    }
    for (from, to) in [("\"format\":1", "\"format\":2"), ("\"schema\":", "\"schema\":9"), ("admin", "../..")] {
        fs::write(target.join(LIST), list.replacen(from, to, 1)).unwrap();
        assert!(matches!(refused().await, RestoreError::List { .. }), "{to}");
    }
    fs::remove_file(target.join(LIST)).unwrap();
    assert!(matches!(refused().await, RestoreError::List { error: ListError::None, .. }));
    fs::write(target.join(LIST), &list).unwrap();
    let log = target.join(format!("logs/{}/1.log", AT.job));
    File::options().write(true).open(&log).unwrap().write_all_at(b"S", 0).unwrap();
    assert!(matches!(refused().await, RestoreError::Damaged { why: "has other bytes", .. }));
    fs::remove_file(&log).unwrap();
    assert!(matches!(refused().await, RestoreError::Damaged { why: "is not there", .. }));
    assert_eq!(fs::read_dir(&new).unwrap().count(), 1, "nothing but the lock: the next try begins anew");
    fs::write(&log, "sealed").unwrap();
    restore(&target, &new, NOW).await.unwrap();
}

#[tokio::test]
async fn a_restore_harms_no_farm() {
    let dir = tempfile::tempdir().unwrap();
    let (farm, target, _) = taken(dir.path()).await;
    let before = fs::read(farm.join(DATABASE)).unwrap();
    let held = DataLock::acquire(&farm).unwrap();
    assert!(matches!(restore(&target, &farm, NOW).await.unwrap_err(), RestoreError::Live(_)));
    drop(held);
    assert!(matches!(restore(&target, &farm, NOW).await.unwrap_err(), RestoreError::Occupied(_)));
    let other = dir.path().join("other/farm");
    fs::create_dir_all(&other).unwrap();
    fs::write(other.join("notes"), "mine").unwrap();
    assert!(matches!(restore(&target, &other, NOW).await.unwrap_err(), RestoreError::Occupied(_)));
    assert_eq!(fs::read(farm.join(DATABASE)).unwrap(), before);
}

#[tokio::test]
async fn objects_are_looked_for_where_the_farm_keeps_them_and_nowhere_else() {
    let dir = tempfile::tempdir().unwrap();
    let (farm, target) = (farm(dir.path()).await, dir.path().join("backup"));
    let bucket = S3 {
        bucket: "b".into(),
        prefix: String::new(),
        endpoint: Some("http://127.0.0.1:9".into()),
        region: "us-east-1".into(),
        key_id: "k".into(),
        secret: Secret::new("s".into()),
        presign: false,
    };
    let source = elsewhere::Source { farm: &farm, database: None, bucket: Some(&bucket) };
    let env = Arc::new(SystemEnv::new(Lifecycle::new()));
    let told =
        elsewhere::take(source, &target, String::new(), env, &CancellationToken::new()).await.unwrap_err().to_string();
    assert!(told.contains("ALLOY_S3_URL says s3://b: start without it"), "{told}");
    crate::blobs::mark::set(&farm, "s3://other").unwrap();
    let told = take(&farm, &target, String::new()).await.unwrap_err().to_string();
    assert!(told.contains("ALLOY_S3_URL is not set: say ALLOY_S3_URL=s3://other"), "{told}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was begun");
}

#[tokio::test]
async fn what_the_farm_has_lost_is_named_and_the_rest_is_saved() {
    let dir = tempfile::tempdir().unwrap();
    let farm = farm(dir.path()).await;
    let key = BlobKey::alone(DEFAULT_ORG, BlobKind::Artifact, &Digest::of(b"artifact"));
    let object = farm.join("blobs/objects").join(key.as_str());
    File::options().write(true).open(&object).unwrap().write_all_at(b"A", 0).unwrap();
    let damaged = take(&farm, &dir.path().join("a"), String::new()).await.unwrap();
    assert!(damaged.missing.len() == 1 && damaged.missing[0].ends_with("is damaged"), "{damaged:?}");
    fs::remove_file(&object).unwrap();
    let missing = take(&farm, &dir.path().join("b"), String::new()).await.unwrap();
    assert!(missing.missing.len() == 1 && missing.missing[0].ends_with("is not there"), "{missing:?}");
    restore(&dir.path().join("b"), &dir.path().join("new/farm"), NOW).await.unwrap();
    let log = farm.join(format!("logs/{}/1.log", AT.job));
    File::options().write(true).open(&log).unwrap().write_all_at(b"S", 0).unwrap();
    let rotten = take(&farm, &dir.path().join("c"), String::new()).await.unwrap();
    let told = format!("logs/{}/1.log is damaged: it is not what its seal says", AT.job);
    assert!(rotten.missing.contains(&told), "{rotten:?}");
}

/// As it is between a look into a directory and the reading of what it names.
fn gone_since(path: &Path) {
    std::os::unix::fs::symlink("nowhere", path).unwrap();
}

#[tokio::test]
async fn what_the_farm_takes_away_meanwhile_is_left_out_whole() {
    let dir = tempfile::tempdir().unwrap();
    let farm = farm(dir.path()).await;
    for name in ["8/1.log", "9/1.log"] {
        let log = farm.join(LOGS).join(name);
        fs::create_dir_all(parent(&log)).unwrap();
        gone_since(&log);
    }
    gone_since(&farm.join(OBJECTS).join("one"));
    let taken = take(&farm, &dir.path().join("a"), String::new()).await.unwrap();
    assert_eq!((taken.files, taken.missing.len()), (6, 0), "{taken:?}");
    // Its bytes were there when they were copied; then the seal was gone, and whether they are all of it cannot be said.
    let part = dir.path().join("part");
    let mut copy = Copy::new(&farm, &part, CancellationToken::new());
    copy.file("admin.token", None).unwrap();
    let stem = format!("{LOGS}/{}/1", AT.job);
    copy.log(&stem).unwrap();
    copy.take_back(1).unwrap();
    let left: Vec<_> = copy.entries.iter().map(|entry| entry.path.as_str()).collect();
    assert_eq!(left, ["admin.token"]);
    assert!(part.join("admin.token").exists() && !part.join(format!("{stem}.log")).exists());
    assert!(sorted(&dir.path().join("none")).unwrap().is_empty(), "a job whose last log is gone has no directory");
}

#[tokio::test]
async fn a_backup_that_failed_or_was_stopped_takes_no_room() {
    let dir = tempfile::tempdir().unwrap();
    let farm = farm(dir.path()).await;
    let all = || fs::read_dir(dir.path()).unwrap().count();
    let stop = CancellationToken::new();
    stop.cancel();
    let (target, part) = (dir.path().join("backup"), Part::begin(&dir.path().join("other")).unwrap());
    let stopped = super::take(&farm, &target, String::new(), &stop).await.unwrap_err();
    assert!(matches!(stopped, BackupError::Stopped) && all() == 2, "{stopped}");
    // As late as that: all that goes before is copied.
    let copied = Copy::new(&farm, part.path(), stop).logs().unwrap_err();
    assert!(matches!(copied, BackupError::Stopped), "{copied}");
    let left = part.end(&target, Err(copied)).await.unwrap_err();
    assert!(matches!(left, BackupError::Stopped) && all() == 1, "{left}");
    // No log, and so nothing that can be read.
    let log = farm.join(format!("logs/{}/1.log", AT.job));
    fs::remove_file(&log).unwrap();
    fs::create_dir(&log).unwrap();
    let failed = take(&farm, &target, String::new()).await.unwrap_err();
    assert!(matches!(failed, BackupError::Io { .. }) && failed.to_string().contains("1.log"), "{failed}");
    assert_eq!(all(), 1, "nothing is left but the farm");
    // Whatever cannot be removed is named.
    let part = Part::begin(&target).unwrap();
    let path = part.path().to_owned();
    fs::rename(&path, dir.path().join("away")).unwrap();
    let told = part.end(&target, Err(BackupError::Stopped)).await.unwrap_err().to_string();
    assert!(
        told.contains("there is no backup. What was copied") && told.contains(&path.display().to_string()),
        "{told}"
    );
}

#[tokio::test]
async fn a_backup_empties_nothing_that_no_backup_has_left_and_opens_its_books_to_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let farm = farm(dir.path()).await;
    let (target, part, mine) = (dir.path().join("c"), dir.path().join("c.partial"), dir.path().join("mine"));
    let make = |mode: u32, files: &[&str]| {
        DirBuilder::new().mode(0o700).create(&part).unwrap();
        files.iter().for_each(|name| fs::write(part.join(name), "mine").unwrap());
        fs::set_permissions(&part, Permissions::from_mode(mode)).unwrap();
    };
    let refused = async || {
        let error = take(&farm, &target, String::new()).await.unwrap_err();
        assert!(matches!(&error, BackupError::Foreign(path) if *path == part), "{error}");
    };
    make(0o700, &["mine.txt"]);
    refused().await;
    assert_eq!(fs::read(part.join("mine.txt")).unwrap(), b"mine");
    fs::write(part.join("backup.lock"), "").unwrap();
    fs::rename(&part, &mine).unwrap();
    std::os::unix::fs::symlink(&mine, &part).unwrap();
    refused().await;
    assert_eq!(fs::read_dir(&mine).unwrap().count(), 2);
    fs::remove_file(&part).unwrap();
    make(0o777, &[]);
    refused().await;
    fs::remove_dir(&part).unwrap();
    // As a file system leaves it that knows no modes.
    make(0o777, &["backup.lock"]);
    take(&farm, &target, String::new()).await.unwrap();
    let mode = |name: &str| fs::metadata(target.join(name)).unwrap().mode() & 0o777;
    assert_eq!((mode(""), mode(DATABASE)), (0o700, 0o600));
}

#[tokio::test]
async fn a_farm_comes_back_where_a_link_leads_to_and_is_made_beside_that() {
    let dir = tempfile::tempdir().unwrap();
    let (farm, target, _) = taken(dir.path()).await;
    let (link, big) = (dir.path().join("new/farm"), dir.path().join("big"));
    fs::create_dir_all(big.join("farm")).unwrap();
    fs::create_dir(dir.path().join("new")).unwrap();
    std::os::unix::fs::symlink(big.join("farm"), &link).unwrap();
    let log = target.join(format!("logs/{}/1.log", AT.job));
    let whole = fs::read(&log).unwrap();
    fs::write(&log, "lost").unwrap();
    restore(&target, &link, NOW).await.unwrap_err();
    assert!(big.join("farm.restoring").is_dir() && !dir.path().join("new/farm.restoring").exists());
    fs::write(&log, whole).unwrap();
    restore(&target, &link, NOW).await.unwrap();
    assert!(link.is_symlink() && !big.join("farm.restoring").exists());
    let token = |farm: &Path| fs::read(farm.join("admin.token")).unwrap();
    assert_eq!(token(&big.join("farm")), token(&farm));
}

async fn into_postgres(backup: &Path, farm: &Path, database: String) -> MoveError {
    let (to, env) = (To { database, bucket: None }, Arc::new(SystemEnv::new(Lifecycle::new())));
    moving::restore(backup, farm, to, NOW, Arc::new(|_: &Counts| {}), env).await.unwrap_err()
}

#[tokio::test]
async fn a_restore_into_a_database_that_refused_is_in_no_other_one_s_way() {
    let dir = tempfile::tempdir().unwrap();
    let (farm, target, _) = taken(dir.path()).await;
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (dead, new) = (format!("postgres://farm@127.0.0.1:{port}/farm"), dir.path().join("new/farm"));
    let refused = into_postgres(&target, &new, dead.clone()).await;
    assert!(matches!(refused, MoveError::Database(_)), "{refused}");
    assert!(!new.join("restoring").exists());
    restore(&target, &new, NOW).await.unwrap();
    // What a version left that made the directory first lets nobody into a farm.
    for (left, gone) in [("restoring", "none"), ("restoring", DATABASE)] {
        fs::create_dir_all(farm.join(left)).unwrap();
        let _ = fs::remove_file(farm.join(gone));
        let refused = into_postgres(&target, &farm, dead.clone()).await;
        assert!(matches!(refused, MoveError::InUse(_)), "without {gone}: {refused}");
    }
    // One that was cut off goes on, as far as can be said without its database.
    fs::write(farm.join("restoring/journal"), "id place\n").unwrap();
    let refused = into_postgres(&target, &farm, dead).await;
    assert!(matches!(refused, MoveError::Database(_)), "{refused}");
}
