//! S: which images the workers shall have.

use alloy_shared::id::OrgId;
use alloy_shared::wire::image::ImageWant;

use super::SqlStore;
use super::conn::{Args, Conn, Reader, Row};
use super::farm::orgs;
use super::fault::Fault;
use super::job::json;
use crate::store::{ImageRow, Scope, StoreError};

super::statements! {
    SET_IMAGE = "INSERT INTO images (org_id, name, want, pinned, workers, labels, generation, at_ms) \
        VALUES ($1, $2, $3, $4, $5, $6, $7, $8) ON CONFLICT (org_id, name) DO UPDATE SET want = excluded.want, \
        pinned = excluded.pinned, workers = excluded.workers, labels = excluded.labels, generation = excluded.generation, \
        at_ms = excluded.at_ms WHERE images.generation <= excluded.generation";
    DROP_IMAGE = "DELETE FROM images WHERE org_id = $1 AND name = $2";

    IMAGES = "SELECT org_id, name, want, pinned, workers, labels, generation, at_ms FROM images WHERE org_id BETWEEN $1 AND $2";
}

pub(super) async fn set_image(conn: &mut Conn<'_>, row: &ImageRow) -> Result<bool, Fault> {
    let args = Args::new().text(row.org).text(&row.name).text(row.want.as_str()).flag(row.pinned);
    let args = args.text(json(&row.workers)).text(json(&row.labels)).int(row.generation).int(row.at.0);
    Ok(conn.run(SET_IMAGE, args).await? == 1)
}

pub(super) async fn drop_image(conn: &mut Conn<'_>, org: &OrgId, name: &str) -> Result<bool, Fault> {
    Ok(conn.run(DROP_IMAGE, Args::new().text(org).text(name)).await? == 1)
}

impl SqlStore {
    pub(super) async fn read_images(&self, scope: &Scope) -> Result<Vec<ImageRow>, StoreError> {
        let (from, to) = orgs(scope);
        let rows = self.rows(IMAGES, Args::new().text(from).text(to)).await?;
        let mut found: Vec<ImageRow> = rows.iter().map(image).collect::<Result<_, _>>()?;
        // Sorted here: a database sorts names by the rules of its language.
        found.sort_by(|a, b| (&a.name, a.org).cmp(&(&b.name, b.org)));
        Ok(found)
    }
}

fn image(row: &Row) -> Result<ImageRow, StoreError> {
    let row = Reader::new(row, "images", "name");
    let want = row.text("want")?;
    Ok(ImageRow {
        org: row.parsed("org_id")?,
        name: row.text("name")?,
        want: ImageWant::ALL.into_iter().find(|known| known.as_str() == want).ok_or_else(|| row.corrupt("want"))?,
        pinned: row.flag("pinned")?,
        workers: row.json("workers")?,
        labels: row.json("labels")?,
        generation: row.int("generation")?,
        at: row.ms("at_ms")?,
    })
}
