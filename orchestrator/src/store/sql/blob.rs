//! S: where blobs are, and the farm's named values.

use std::collections::BTreeSet;

use alloy_shared::id::Digest;

use super::SqlStore;
use super::conn::{Args, Conn, Reader, Row};
use super::fault::Fault;
use super::wide::Kind::{Flag as F, Int as I, Text as T};
use super::wide::Wide;
use crate::store::{Blob, BlobKind, Place, Scope, StoreError};

super::statements! {
    INSERT_BLOB = "INSERT INTO blobs (digest, kind, org_id, size_bytes, object, frame_at, stored_bytes, zstd, frame_bytes, \
        raw_at, created_at_ms, used_at_ms) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12) ON CONFLICT (digest, kind, org_id) DO NOTHING";
    BLOBS = "WITH asked (digest, kind, org_id) AS (VALUES (CAST($1 AS TEXT), CAST($2 AS TEXT), CAST($3 AS TEXT))) \
        SELECT blobs.digest, blobs.kind, blobs.org_id, blobs.size_bytes, blobs.object, blobs.frame_at, blobs.stored_bytes, \
        blobs.zstd, blobs.frame_bytes, blobs.raw_at, blobs.created_at_ms, blobs.used_at_ms FROM asked JOIN blobs \
        ON blobs.digest = CAST(asked.digest AS TEXT) AND blobs.kind = CAST(asked.kind AS TEXT) \
        AND (blobs.org_id = asked.org_id OR asked.org_id IS NULL)";
    // Waits for whoever takes it to be deleted, and then finds it taken.
    KEEP_OBJECT = "DELETE FROM trash WHERE object = $1 AND taken_at_ms IS NULL";
    TAKEN_OBJECT = "SELECT object FROM trash WHERE object = $1";
    INSERT_META = "INSERT INTO meta (name, value) VALUES ($1, $2) ON CONFLICT (name) DO NOTHING";
    META = "SELECT name, value FROM meta WHERE name = $1";
}

static INSERTS_WIDE: Wide = Wide::new(INSERT_BLOB, &[T, T, T, I, T, I, I, F, I, I, I, I]);
static BLOBS_WIDE: Wide = Wide::new(BLOBS, &[T, T, T]);
pub(super) static WIDE: [&Wide; 2] = [&INSERTS_WIDE, &BLOBS_WIDE];

/// Blobs that are known already stay as they are. False: one of their objects is taken to be deleted.
pub(super) async fn add(conn: &mut Conn<'_>, blobs: &[Blob]) -> Result<bool, Fault> {
    let objects: BTreeSet<&str> = blobs.iter().map(|blob| blob.place.object()).collect();
    for object in objects {
        conn.run(KEEP_OBJECT, Args::new().text(object)).await?;
        if conn.first(TAKEN_OBJECT, Args::new().text(object)).await?.is_some() {
            return Ok(false);
        }
    }
    let mut args = Args::new();
    for blob in blobs {
        args = args.text(blob.digest).text(kind_word(blob.kind)).text(blob.org).size(blob.size);
        args = match &blob.place {
            Place::Alone { object } => {
                args.text(object).maybe_int(None).maybe_int(None).maybe_flag(None).maybe_int(None).maybe_int(None)
            }
            Place::Packed { object, frame_at, stored, zstd, raw_len, raw_at } => {
                let frame = args.text(object).size(*frame_at).int((*stored).into()).flag(*zstd);
                frame.int((*raw_len).into()).int((*raw_at).into())
            }
        };
        args = args.int(blob.created_at.0).int(blob.used_at.0);
    }
    conn.run_wide(WIDE[0], args).await?;
    Ok(true)
}

/// The first value stays.
pub(super) async fn add_meta(conn: &mut Conn<'_>, name: &str, value: &str) -> Result<bool, Fault> {
    conn.run(INSERT_META, Args::new().text(name).text(value)).await?;
    Ok(true)
}

pub(super) const fn kind_word(kind: BlobKind) -> &'static str {
    match kind {
        BlobKind::Chunk => "chunk",
        BlobKind::Manifest => "manifest",
        BlobKind::Artifact => "artifact",
    }
}

impl SqlStore {
    pub(super) async fn read_blobs(
        &self,
        scope: &Scope,
        kind: BlobKind,
        digests: &[Digest],
    ) -> Result<Vec<Blob>, StoreError> {
        let mut args = Args::new();
        for digest in digests {
            args = args.text(digest).text(kind_word(kind)).maybe_text(scope.filter());
        }
        let rows = self.rows_wide(WIDE[1], args).await?;
        let mut found: Vec<Blob> = rows.iter().map(|row| blob(row, kind)).collect::<Result<_, _>>()?;
        found.sort_by_key(|blob| (blob.digest, blob.org));
        found.dedup();
        Ok(found)
    }

    pub(super) async fn read_meta(&self, name: &str) -> Result<Option<String>, StoreError> {
        let rows = self.rows(META, Args::new().text(name)).await?;
        rows.first().map(|row| Reader::new(row, "meta", "name").text("value")).transpose()
    }
}

pub(super) fn blob(row: &Row, kind: BlobKind) -> Result<Blob, StoreError> {
    let row = Reader::new(row, "blobs", "digest");
    let object = row.text("object")?;
    let place = match row.maybe_size("frame_at")? {
        None => Place::Alone { object },
        Some(frame_at) => Place::Packed {
            object,
            frame_at,
            stored: row.size("stored_bytes")?,
            zstd: row.flag("zstd")?,
            raw_len: row.size("frame_bytes")?,
            raw_at: row.size("raw_at")?,
        },
    };
    Ok(Blob {
        org: row.parsed("org_id")?,
        digest: row.parsed("digest")?,
        kind,
        size: row.size("size_bytes")?,
        place,
        created_at: row.ms("created_at_ms")?,
        used_at: row.ms("used_at_ms")?,
    })
}
