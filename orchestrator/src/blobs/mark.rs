//! S: where a farm's objects lie, beside its books: a farm that is started with another place would miss them all.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::sync_dir;

const MARK: &str = "blobs.place";
const OBJECTS: &str = "blobs/objects";

/// Why objects are not looked for where the configuration says. The text is for people.
#[derive(Debug, thiserror::Error)]
pub enum Elsewhere {
    #[error(
        "the objects of this farm lie in {marked}, but {}: say ALLOY_S3_URL={marked}; if you have moved them yourself, \
         remove {}",
        .told.as_ref().map_or_else(|| "ALLOY_S3_URL is not set".to_owned(), |told| format!("ALLOY_S3_URL says {told}")),
        .file.display()
    )]
    Marked { marked: String, told: Option<String>, file: PathBuf },
    #[error(
        "the objects of this farm lie in files, but ALLOY_S3_URL says {told}: start without it; a new farm with it needs a \
         data directory of its own ({} is not empty)",
        .dir.display()
    )]
    Files { told: String, dir: PathBuf },
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> Elsewhere + '_ {
    move |error| Elsewhere::Io { path: path.to_owned(), error }
}

/// The bucket that the farm in this directory was started with. `None`: its objects are files beside it.
pub fn bucket_of(farm: &Path) -> Result<Option<String>, Elsewhere> {
    let file = farm.join(MARK);
    match fs::read_to_string(&file) {
        Ok(text) => Ok(Some(text.trim().to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at(&file)(error)),
    }
}

/// Compares what the configuration says with where the objects are.
pub(crate) fn compare(farm: &Path, told: Option<&str>) -> Result<(), Elsewhere> {
    let file = farm.join(MARK);
    match (bucket_of(farm)?, told) {
        (Some(marked), told) if told != Some(&marked) => {
            Err(Elsewhere::Marked { marked, told: told.map(str::to_owned), file })
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
    let (file, new) = (farm.join(MARK), farm.join("blobs.place.new"));
    let write = || {
        fs::write(&new, format!("{bucket}\n"))?;
        fs::File::open(&new)?.sync_all()?;
        fs::rename(&new, &file)?;
        sync_dir(farm)
    };
    if bucket_of(farm)?.is_some() { Ok(()) } else { write().map_err(at(&file)) }
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
}
