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
    let busy = begin(&part).unwrap();
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
    let told = elsewhere::take(source, &target, String::new(), env).await.unwrap_err().to_string();
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
}
