//! S: a commit's groups in their order. Neighbours that change one job each, and different ones, are written together,
//! statement by statement. Misses are rare, so the first try takes no savepoints; a second one finds who missed.

use std::collections::HashSet;

use alloy_shared::limits;
use sqlx::postgres::PgPool;

use super::conn::{Args, Conn};
use super::fault::{Fault, of};
use super::{blob, farm, image, job, member, tidy};
use crate::store::{Committed, Group, Miss, StoreError, Write};

super::statements! {
    SAVEPOINT = "SAVEPOINT alloy";
    ROLLBACK = "ROLLBACK TO SAVEPOINT alloy";
    RELEASE = "RELEASE SAVEPOINT alloy";
}

/// Writes all groups, or returns nothing as soon as one of them misses; what was done by then is for the caller to undo.
/// Only a single group's miss is an answer.
pub(super) async fn try_all(conn: &mut Conn<'_>, groups: &[Group]) -> Result<Option<Committed>, StoreError> {
    let mut done = Vec::with_capacity(groups.len());
    let mut rest = groups;
    while !rest.is_empty() {
        let (now, later) = rest.split_at(alike(rest).max(1));
        rest = later;
        match now {
            [group] => done.push(alone(conn, group).await?),
            _ if together(conn, now).await? => done.extend(now.iter().map(numbers)),
            _ => return Ok(None),
        }
        if groups.len() > 1 && done.last().is_some_and(Result::is_err) {
            return Ok(None);
        }
    }
    Ok(Some(Committed { groups: done }))
}

/// Writes all groups as one statement, where they can be. `None`: they cannot, or one of them missed and nothing was written.
pub(super) async fn at_once(pool: &PgPool, groups: &[Group]) -> Result<Option<Committed>, StoreError> {
    if alike(groups) < groups.len() {
        return Ok(None);
    }
    let writes: Vec<&Write> = groups.iter().flat_map(|group| &group.0).collect();
    let written = job::write_at_once(pool, &writes).await?;
    Ok(written.then(|| Committed { groups: groups.iter().map(numbers).collect() }))
}

/// Writes every group that does not miss. What fails together is halved until the one that failed is alone.
pub(super) async fn each(conn: &mut Conn<'_>, groups: &[Group]) -> Result<Committed, StoreError> {
    let mut done = Vec::with_capacity(groups.len());
    let mut todo = vec![groups];
    while let Some(part) = todo.pop() {
        let (now, later) = part.split_at(alike(part).max(1).min(part.len()));
        if !later.is_empty() {
            todo.push(later);
        }
        let Some(first) = now.first() else { continue };
        run_plain(conn, SAVEPOINT).await?;
        let (result, whole) = match now.len() {
            1 => (vec![alone(conn, first).await?], true),
            _ if together(conn, now).await? => (now.iter().map(numbers).collect(), true),
            _ => (Vec::new(), false),
        };
        if !whole || result.iter().any(Result::is_err) {
            run_plain(conn, ROLLBACK).await?;
        }
        run_plain(conn, RELEASE).await?;
        if !whole {
            let (front, back) = now.split_at(now.len() / 2);
            todo.extend([back, front]);
        }
        done.extend(result);
    }
    Ok(Committed { groups: done })
}

/// Returns whether every one of these different jobs' groups hit.
async fn together(conn: &mut Conn<'_>, groups: &[Group]) -> Result<bool, StoreError> {
    let writes: Vec<&Write> = groups.iter().flat_map(|group| &group.0).collect();
    match job::write(conn, &writes).await {
        Ok(all) => Ok(all),
        Err(Fault::Refused(_)) => Ok(false),
        Err(Fault::Store(error)) => Err(error),
    }
}

fn numbers(group: &Group) -> Result<Vec<i64>, Miss> {
    Ok(group.0.iter().map(number).collect())
}

/// How many groups from the front may be written together: in any order they would do the same.
fn alike(groups: &[Group]) -> usize {
    let mut jobs = HashSet::new();
    let mut keys = HashSet::new();
    let first = groups.iter().take(limits::COMMIT_TOGETHER_MAX);
    let differing = first.take_while(|group| match group.0.as_slice() {
        [Write::InsertJob(insert)] => {
            let key = insert.key.as_ref();
            jobs.insert(insert.job.id) && key.is_none_or(|key| keys.insert((key.org, &*key.caller, &*key.key)))
        }
        [Write::Advance(advance)] => jobs.insert(advance.next.id),
        [Write::CloseAttempt(close)] => jobs.insert(close.at.job),
        _ => false,
    });
    differing.count()
}

/// Writes one group up to its first miss. What it wrote until then is for the caller to undo.
async fn alone(conn: &mut Conn<'_>, group: &Group) -> Result<Result<Vec<i64>, Miss>, StoreError> {
    let mut numbers = Vec::with_capacity(group.0.len());
    for write in &group.0 {
        match one(conn, write).await {
            Ok(Ok(number)) => numbers.push(number),
            Ok(Err(miss)) => return Ok(Err(miss)),
            Err(Fault::Refused(why)) => return Ok(Err(Miss::Corrupt(why))),
            Err(Fault::Store(error)) => return Err(error),
        }
    }
    Ok(Ok(numbers))
}

async fn one(conn: &mut Conn<'_>, write: &Write) -> Result<Result<i64, Miss>, Fault> {
    let hit = match write {
        Write::InsertJob(insert) => {
            return Ok(job::insert(conn, insert).await?.map_or(Ok(number(write)), Err));
        }
        Write::Advance(_) | Write::CloseAttempt(_) => job::write(conn, &[write]).await?,
        Write::OpenSession(open) => return farm::open_session(conn, open).await,
        Write::Enrol(enrol) => farm::enrol(conn, enrol).await?,
        Write::SetWorker(set) => farm::set_worker(conn, set).await?,
        Write::RevokeWorker { org, worker } => farm::revoke_worker(conn, org, worker).await?,
        Write::Seen { worker, at, left } => farm::seen(conn, worker, *at, *left).await?,
        Write::AddToken(token) => farm::add_token(conn, token).await?,
        Write::RevokeToken { org, id, at } => farm::revoke_token(conn, org, id, *at).await?,
        Write::SetMember(row) => member::set_member(conn, row).await?,
        Write::DropMember { org, user } => member::drop_member(conn, org, user).await?,
        Write::SetImage(row) => image::set_image(conn, row).await?,
        Write::DropImage { org, name } => image::drop_image(conn, org, name).await?,
        Write::AddBlobs(blobs) => blob::add(conn, blobs).await?,
        Write::Tidy(write) => return tidy::write(conn, write).await,
        Write::AddMeta { name, value } => blob::add_meta(conn, name, value).await?,
    };
    Ok(if hit { Ok(number(write)) } else { Err(Miss::Stale) })
}

/// The new number of the row of a write that hit.
fn number(write: &Write) -> i64 {
    match write {
        Write::InsertJob(insert) => insert.job.version,
        Write::Advance(advance) => advance.next.version,
        Write::CloseAttempt(_)
        | Write::Enrol(_)
        | Write::SetWorker(_)
        | Write::RevokeWorker { .. }
        | Write::OpenSession(_)
        | Write::Seen { .. }
        | Write::AddToken(_)
        | Write::RevokeToken { .. }
        | Write::SetMember(_)
        | Write::DropMember { .. }
        | Write::SetImage(_)
        | Write::DropImage { .. }
        | Write::AddBlobs(_)
        | Write::Tidy(_)
        | Write::AddMeta { .. } => 0,
    }
}

async fn run_plain(conn: &mut Conn<'_>, text: &'static str) -> Result<(), StoreError> {
    conn.run(text, Args::new()).await.map_err(of)?;
    Ok(())
}
