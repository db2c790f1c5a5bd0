//! S: where a farm's objects lie, beside its books: a farm that is started with another place would miss them all.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::sync_dir;

const MARK: &str = "blobs.place";
const OBJECTS: &str = "blobs/objects";
/// Tells this directory from all others, wherever it is and whatever it is called.
const ID: &str = "blobs.id";
const FILES: &str = "files:";

/// Why objects are not looked for where the configuration says. The text is for people.
#[derive(Debug, thiserror::Error)]
pub enum Elsewhere {
    /// The file is what says so, unless it is the books.
    #[error(
        "the objects of this farm lie in {kept}, but {}: say ALLOY_S3_URL={kept}{}",
        unlike(told.as_deref()),
        file.as_deref().map(moved).unwrap_or_default()
    )]
    Bucket { kept: String, told: Option<String>, file: Option<PathBuf> },
    #[error(
        "the objects of this farm lie in files ({}), but ALLOY_S3_URL says {told}: start without it; a new farm with it needs a \
         data directory of its own",
        .dir.display()
    )]
    Files { told: String, dir: PathBuf },
    #[error(
        "the objects of this farm lie in files of another data directory, the one whose farm/{ID} says {id}: say --data-dir and its \
         path, and no ALLOY_S3_URL. Orchestrators on several machines need a bucket. If you have brought the files here yourself, \
         write {id} into {}", .file.display()
    )]
    OtherFiles { id: String, file: PathBuf },
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

fn unlike(told: Option<&str>) -> String {
    told.map_or_else(|| "ALLOY_S3_URL is not set".to_owned(), |told| format!("ALLOY_S3_URL says {told}"))
}

fn moved(file: &Path) -> String {
    format!("; if you have moved them yourself, remove {}", file.display())
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> Elsewhere + '_ {
    move |error| Elsewhere::Io { path: path.to_owned(), error }
}

fn read(file: &Path) -> Result<Option<String>, Elsewhere> {
    match fs::read_to_string(file) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at(file)(error)),
    }
}

fn write(farm: &Path, name: &str, text: &str) -> Result<(), Elsewhere> {
    let (file, new) = (farm.join(name), farm.join(format!("{name}.new")));
    let write = || {
        fs::write(&new, format!("{text}\n"))?;
        fs::File::open(&new)?.sync_all()?;
        fs::rename(&new, &file)?;
        sync_dir(farm)
    };
    write().map_err(at(&file))
}

/// The bucket that the farm in this directory was started with. `None`: its objects are files beside it.
pub fn bucket_of(farm: &Path) -> Result<Option<String>, Elsewhere> {
    read(&farm.join(MARK))
}

/// Where the objects are if they are files of this directory, as a database beside others says it. `fresh` names a directory that
/// has no name.
pub(crate) fn files_of(farm: &Path, fresh: impl FnOnce() -> u128) -> Result<String, Elsewhere> {
    let id = match read(&farm.join(ID))? {
        Some(id) => id,
        None => {
            let id = format!("{:032x}", fresh());
            write(farm, ID, &id)?;
            id
        }
    };
    Ok(format!("{FILES}{id}"))
}

/// Compares what such a database says with what the configuration says.
pub(crate) fn compare_books(kept: &str, farm: &Path, told: Option<&str>) -> Result<(), Elsewhere> {
    match kept.strip_prefix(FILES) {
        Some(id) if read(&farm.join(ID))?.as_deref() != Some(id) => {
            Err(Elsewhere::OtherFiles { id: id.to_owned(), file: farm.join(ID) })
        }
        Some(_) => match told {
            Some(told) => Err(Elsewhere::Files { told: told.to_owned(), dir: farm.join(OBJECTS) }),
            None => Ok(()),
        },
        None if told == Some(kept) => Ok(()),
        None => Err(Elsewhere::Bucket { kept: kept.to_owned(), told: told.map(str::to_owned), file: None }),
    }
}

/// Compares what the configuration says with where the objects are.
pub(crate) fn compare(farm: &Path, told: Option<&str>) -> Result<(), Elsewhere> {
    match (bucket_of(farm)?, told) {
        (Some(kept), told) if told != Some(&kept) => {
            Err(Elsewhere::Bucket { kept, told: told.map(str::to_owned), file: Some(farm.join(MARK)) })
        }
        (None, Some(told)) => {
            let dir = farm.join(OBJECTS);
            let mut entries = match fs::read_dir(&dir) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                entries => entries.map_err(at(&dir))?,
            };
            match entries.next() {
                Some(_) => Err(Elsewhere::Files { told: told.to_owned(), dir }),
                None => Ok(()),
            }
        }
        (Some(_) | None, _) => Ok(()),
    }
}

/// Writes down that the objects lie in this bucket.
pub(crate) fn set(farm: &Path, bucket: &str) -> Result<(), Elsewhere> {
    if bucket_of(farm)?.is_some() { Ok(()) } else { write(farm, MARK, bucket) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_farm_does_not_lose_sight_of_its_objects() {
        let dir = tempfile::tempdir().unwrap();
        let farm = dir.path();
        compare(farm, None).unwrap();
        compare(farm, Some("s3://b/p")).unwrap();
        set(farm, "s3://b/p").unwrap();
        set(farm, "s3://b/p").unwrap();
        compare(farm, Some("s3://b/p")).unwrap();
        let unset = compare(farm, None).unwrap_err().to_string();
        assert!(unset.contains("ALLOY_S3_URL is not set: say ALLOY_S3_URL=s3://b/p;"), "{unset}");
        let other = compare(farm, Some("s3://c")).unwrap_err().to_string();
        assert!(other.contains("lie in s3://b/p, but ALLOY_S3_URL says s3://c"), "{other}");
        fs::remove_file(farm.join(MARK)).unwrap();
        fs::create_dir_all(farm.join("blobs/objects/org_x")).unwrap();
        compare(farm, None).unwrap();
        assert!(compare(farm, Some("s3://b/p")).unwrap_err().to_string().contains("lie in files"));
    }

    #[test]
    fn a_directory_is_known_by_what_lies_in_it_and_not_by_its_path() {
        let dir = tempfile::tempdir().unwrap();
        let [one, other] = ["one", "other"].map(|name| dir.path().join(name));
        fs::create_dir(&one).unwrap();
        fs::create_dir(&other).unwrap();
        let kept = files_of(&one, || 7).unwrap();
        assert_eq!(files_of(&one, || 8).unwrap(), kept, "it has one name for ever");
        compare_books(&kept, &one, None).unwrap();
        let (moved, bucket) = (dir.path().join("moved"), Some("s3://b/p"));
        fs::rename(&one, &moved).unwrap();
        compare_books(&kept, &moved, None).unwrap();
        for told in [None, bucket] {
            let said = compare_books(&kept, &other, told).unwrap_err().to_string();
            assert!(said.contains("another data directory") && said.contains("00000007"), "{said}");
        }
        let said = compare_books(&kept, &moved, bucket).unwrap_err().to_string();
        assert!(said.contains("ALLOY_S3_URL says s3://b/p: start without it"), "{said}");
        assert!(!other.join(ID).exists(), "a directory that is not the farm's is left as it is");
        compare_books("s3://b/p", &other, bucket).unwrap();
        for told in [None, Some("s3://c")] {
            let said = compare_books("s3://b/p", &moved, told).unwrap_err().to_string();
            assert!(said.ends_with("say ALLOY_S3_URL=s3://b/p"), "{said}");
        }
    }
}
