//! D: where the farm's state is kept.

use alloy_shared::config::{Key, Layers, Origin};
use alloy_shared::secret::Secret;

const MODE: Key = Key { name: "database_mode", flag: None, variable: Some("DATABASE_MODE") };
const URL: Key = Key { name: "database_url", flag: None, variable: Some("DATABASE_URL") };

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Database {
    /// SQLite in the data directory.
    Local,
    /// The address of a Postgres that orchestrators may share.
    Postgres(Secret<String>),
}

impl Database {
    pub(super) fn take(layers: &mut Layers) -> Self {
        let mode = layers.take(MODE, "local".to_owned(), checked_mode);
        let is_postgres = |text: &str| text.starts_with("postgres://") || text.starts_with("postgresql://");
        let why = "is no address like postgres://user:password@host:5432/database";
        let url = layers.take_secret(URL, why, |text| is_postgres(text).then(|| text.to_owned()));
        if mode != "local" && layers.origin(URL) == Origin::Default {
            let why = format!("mode `{mode}` needs the database's address: set DATABASE_URL");
            layers.problem(MODE.name, layers.origin(MODE), why);
        }
        match url {
            Some(url) if mode != "local" => Self::Postgres(url),
            Some(_) | None => Self::Local,
        }
    }
}

fn checked_mode(text: &str) -> Result<String, String> {
    match text {
        "local" | "postgres" | "supabase" => Ok(text.to_owned()),
        _ => Err("is no mode: it is local, postgres or supabase".to_owned()),
    }
}
