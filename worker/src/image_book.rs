//! S: where a worker remembers its images: which wishes it fulfilled, and when each was used last.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::image_plan::Book;

const FILE: &str = "images.json";

#[derive(Debug, Clone)]
pub enum BookFile {
    Disk(PathBuf),
    Mem(Arc<Mutex<Book>>),
}

impl BookFile {
    pub fn new(state_dir: &Path) -> Self {
        Self::Disk(state_dir.join(FILE))
    }

    /// Survives whoever does not hold it alone. For the simulator.
    pub fn memory() -> Self {
        Self::Mem(Arc::default())
    }

    /// A file that is missing or damaged is an empty book: wishes are fulfilled again, which harms nothing.
    pub fn load(&self) -> Book {
        let path = match self {
            Self::Disk(path) => path,
            Self::Mem(book) => return book.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        };
        match std::fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|error| {
                tracing::warn!(%error, "{} cannot be read; beginning anew", path.display());
                Book::default()
            }),
            Err(error) if error.kind() == ErrorKind::NotFound => Book::default(),
            Err(error) => {
                tracing::warn!(%error, "{} cannot be read; beginning anew", path.display());
                Book::default()
            }
        }
    }

    /// Whole or not at all.
    pub fn save(&self, book: &Book) -> io::Result<()> {
        let path = match self {
            Self::Disk(path) => path,
            Self::Mem(kept) => {
                kept.lock().unwrap_or_else(PoisonError::into_inner).clone_from(book);
                return Ok(());
            }
        };
        let part = path.with_extension("part");
        std::fs::write(&part, serde_json::to_vec(book).map_err(io::Error::other)?)?;
        std::fs::rename(part, path)
    }
}

#[cfg(test)]
mod tests {
    use alloy_shared::env::Ms;
    use alloy_shared::id::Digest;

    use super::*;

    #[test]
    fn a_book_survives_its_file_and_a_damaged_one_is_empty() {
        let dir = tempfile::tempdir().unwrap();
        let file = BookFile::new(dir.path());
        assert_eq!(file.load(), Book::default());
        let book = Book { done: [("a".into(), 3)].into(), used_at: [(Digest::of(b"a"), Ms(5))].into() };
        file.save(&book).unwrap();
        assert_eq!(file.load(), book);
        std::fs::write(dir.path().join(FILE), "{").unwrap();
        assert_eq!(file.load(), Book::default());
    }
}
