//! S: a farm that was moved away, told in its old directory: two farms of one history would both give out its jobs.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use crate::blobs::sync_dir;

const MARK: &str = "moved";

/// Where a farm went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gone {
    /// The database, as people may see it.
    pub to: String,
    /// The bucket of its objects, if they went too.
    pub bucket: Option<String>,
}

/// Why the farm in a directory does not start. The text is for people.
#[derive(Debug, thiserror::Error)]
pub enum MovedAway {
    #[error(
        "this farm was moved to {to}: start it there (DATABASE_MODE=postgres, DATABASE_URL). What is left here is as old as \
         the move, and workers would do its jobs twice; to run it nevertheless, remove {}",
        .file.display()
    )]
    To { to: String, file: PathBuf },
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

/// Where the farm of this directory went. `None`: it is here.
pub fn gone(farm: &Path) -> Result<Option<Gone>, MovedAway> {
    let path = farm.join(MARK);
    let text = match fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(MovedAway::Io { path, error }),
        Ok(text) => text,
    };
    let mut lines = text.lines().map(str::to_owned);
    Ok(Some(Gone { to: lines.next().unwrap_or_default(), bucket: lines.next() }))
}

/// Refuses a farm that went away.
pub(crate) fn check(farm: &Path) -> Result<(), MovedAway> {
    match gone(farm)? {
        Some(Gone { to, .. }) => Err(MovedAway::To { to, file: farm.join(MARK) }),
        None => Ok(()),
    }
}

/// From here on no orchestrator starts on this directory's database.
pub(super) fn set(farm: &Path, gone: &Gone) -> io::Result<()> {
    let new = farm.join("moved.new");
    let mut file = fs::File::create(&new)?;
    writeln!(file, "{}", gone.to)?;
    if let Some(bucket) = &gone.bucket {
        writeln!(file, "{bucket}")?;
    }
    file.sync_all()?;
    fs::rename(&new, farm.join(MARK))?;
    sync_dir(farm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_farm_that_was_moved_away_says_where_to() {
        let dir = tempfile::tempdir().unwrap();
        check(dir.path()).unwrap();
        let gone_to = Gone { to: "postgres://db:5432/farm".into(), bucket: Some("s3://b/p".into()) };
        set(dir.path(), &gone_to).unwrap();
        assert_eq!(gone(dir.path()).unwrap(), Some(gone_to));
        let refused = check(dir.path()).unwrap_err().to_string();
        assert!(refused.contains("moved to postgres://db:5432/farm") && refused.contains("remove "), "{refused}");
        fs::remove_file(dir.path().join(MARK)).unwrap();
        check(dir.path()).unwrap();
    }
}
