//! S: texts that take many rows at once: SQLite gets one for each of some widths, Postgres one that takes a column as an array.

use std::sync::OnceLock;

use sqlx::Arguments as _;
use sqlx::postgres::PgArguments;

use super::conn::{Arg, Args};

/// How many rows one statement may carry on SQLite. A batch is cut into the largest that fit.
const WIDTHS: [usize; 9] = [256, 128, 64, 32, 16, 8, 4, 2, 1];

/// What a column holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Int,
    Flag,
}

impl Kind {
    const fn word(self) -> &'static str {
        match self {
            Self::Text => "TEXT",
            Self::Int => "BIGINT",
            Self::Flag => "BOOLEAN",
        }
    }
}

/// A text with one row of parameters, `VALUES ($1, …)`, and the same text for more rows. A parameter stands there as it is, or
/// in a cast to what its column holds.
#[derive(Debug)]
pub(super) struct Wide {
    text: &'static str,
    pub(super) columns: &'static [Kind],
    sqlite: [OnceLock<&'static str>; WIDTHS.len()],
    postgres: OnceLock<&'static str>,
}

impl Wide {
    pub(super) const fn new(text: &'static str, columns: &'static [Kind]) -> Self {
        Self { text, columns, sqlite: [const { OnceLock::new() }; _], postgres: OnceLock::new() }
    }

    /// For SQLite: the texts, and what each of them is given.
    pub(super) fn split(&self, rows: Args) -> impl Iterator<Item = (&'static str, Args)> {
        let mut rest = rows.0.into_iter();
        std::iter::from_fn(move || {
            let left = rest.len() / self.columns.len();
            let at = WIDTHS.iter().position(|width| *width <= left)?;
            // Leaked once per text and width: the driver takes only texts that live for ever.
            let text = self.sqlite[at].get_or_init(|| widened(self.text, WIDTHS[at]).leak());
            Some((*text, Args(rest.by_ref().take(WIDTHS[at] * self.columns.len()).collect())))
        })
    }

    /// For Postgres: one text, and all rows as arrays. It stays the same text whatever their number is, so the server plans it
    /// once. `None`: there are no rows.
    pub(super) fn whole(&self, rows: Args) -> Result<Option<(&'static str, PgArguments)>, sqlx::Error> {
        if rows.0.is_empty() {
            return Ok(None);
        }
        let mut out = PgArguments::default();
        self.fill(rows, &mut out)?;
        let text = self.postgres.get_or_init(|| self.for_postgres().leak());
        Ok(Some((*text, out)))
    }

    /// What Postgres is sent.
    pub(super) fn for_postgres(&self) -> String {
        unnested(self.text, self.columns, 0, "")
    }

    fn fill(&self, rows: Args, out: &mut PgArguments) -> Result<(), sqlx::Error> {
        let height = rows.0.len() / self.columns.len();
        let mut columns: Vec<Column> = self.columns.iter().map(|kind| Column::new(*kind, height)).collect();
        for (at, arg) in rows.0.into_iter().enumerate() {
            columns[at % self.columns.len()].push(arg).map_err(|why| sqlx::Error::Encode(why.into()))?;
        }
        for column in columns {
            match column {
                Column::Text(values) => out.add(values),
                Column::Int(values) => out.add(values),
                Column::Flag(values) => out.add(values),
            }
            .map_err(sqlx::Error::Encode)?;
        }
        Ok(())
    }
}

/// How many texts a chain has.
pub(super) const LINKS: usize = 7;
/// How many of them, from the first on, are guarded: they may touch fewer rows than they are given.
pub(super) const GUARDS: usize = 4;

/// Texts whose rows are written together. Each touches rows that no other one looks at, so they may run as one statement.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) links: [&'static Wide; LINKS],
    /// By which of them have rows.
    counted: [OnceLock<&'static str>; 1 << LINKS],
    checked: [OnceLock<&'static str>; 1 << LINKS],
}

/// What becomes of a chain on Postgres whose guarded texts touch fewer rows than they must.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// It answers how many rows each of them touched, and writes nothing else.
    Count,
    /// It fails with a division by zero, so that nothing at all is written: it may be a transaction of its own.
    Check,
}

impl Chain {
    pub(super) const fn new(links: [&'static Wide; LINKS]) -> Self {
        Self { links, counted: [const { OnceLock::new() }; _], checked: [const { OnceLock::new() }; _] }
    }

    /// For Postgres: one text that writes all rows. `None`: there are none.
    pub(super) fn whole(
        &self,
        rows: [Args; LINKS],
        guarded: u64,
        ending: Ending,
    ) -> Result<Option<(&'static str, PgArguments)>, sqlx::Error> {
        let mut out = PgArguments::default();
        out.add(i64::try_from(guarded).unwrap_or(-1)).map_err(sqlx::Error::Encode)?;
        let mut which = 0;
        for (at, (link, rows)) in self.links.iter().zip(rows).enumerate() {
            if !rows.0.is_empty() {
                which |= 1 << at;
                link.fill(rows, &mut out)?;
            }
        }
        let texts = if ending == Ending::Count { &self.counted } else { &self.checked };
        let text = || *texts[which].get_or_init(|| self.chained(which, ending).leak());
        Ok((which > 0).then(|| (text(), out)))
    }

    /// Every text that Postgres may be sent.
    pub(super) fn for_postgres(&self) -> impl Iterator<Item = String> {
        let endings = [Ending::Count, Ending::Check];
        (1..1 << LINKS).flat_map(move |which| endings.map(|ending| self.chained(which, ending)))
    }

    /// The first parameter is how many rows the guarded texts must touch.
    fn chained(&self, which: usize, ending: Ending) -> String {
        let is_there = |at: usize| which & (1 << at) != 0;
        let count = |at: usize| match is_there(at) {
            true => format!("(SELECT COUNT(*) FROM part_{at})"),
            false => "0::BIGINT".to_owned(),
        };
        let counts: Vec<String> = (0..GUARDS).map(count).collect();
        let all_hit = format!("{} = $1", counts.join(" + "));
        let (answer, only_if) = match ending {
            // The number has a type here also where no text is under its condition.
            Ending::Count => (format!("{}, $1::BIGINT", counts.join(", ")), format!(" WHERE {all_hit}")),
            Ending::Check => (format!("1 / (CASE WHEN {all_hit} THEN 1 ELSE 0 END)"), String::new()),
        };
        let (mut parts, mut taken) = (Vec::new(), 1);
        for (at, link) in self.links.iter().enumerate().filter(|(at, _)| is_there(*at)) {
            let (only_if, returning) = if at < GUARDS { ("", " RETURNING 1") } else { (&*only_if, "") };
            // A row that is there already may be an error where nothing is written then: to look for it first takes a search.
            let is_error = ending == Ending::Check && at < GUARDS;
            let text = if is_error { link.text.split(" ON CONFLICT ").next().unwrap_or_default() } else { link.text };
            parts.push(format!("part_{at} AS ({}{returning})", unnested(text, link.columns, taken, only_if)));
            taken += link.columns.len();
        }
        ["WITH", &parts.join(", "), "SELECT", &answer].join(" ")
    }
}

/// One column of all rows.
enum Column {
    Text(Vec<Option<String>>),
    Int(Vec<Option<i64>>),
    Flag(Vec<Option<bool>>),
}

impl Column {
    fn new(kind: Kind, height: usize) -> Self {
        match kind {
            Kind::Text => Self::Text(Vec::with_capacity(height)),
            Kind::Int => Self::Int(Vec::with_capacity(height)),
            Kind::Flag => Self::Flag(Vec::with_capacity(height)),
        }
    }

    fn push(&mut self, arg: Arg) -> Result<(), &'static str> {
        match (self, arg) {
            (Self::Text(values), Arg::Text(value)) => values.push(value),
            (Self::Int(values), Arg::Int(value)) => values.push(value),
            (Self::Flag(values), Arg::Flag(value)) => values.push(value),
            (Self::Text(_) | Self::Int(_) | Self::Flag(_), _) => return Err("a value of another kind than its column"),
        }
        Ok(())
    }
}

/// What stands before `VALUES`, the row inside its brackets, and what follows.
fn parts(text: &str) -> (&str, &str, &str) {
    let (head, from_row) = text.split_once("VALUES (").unwrap_or((text, ""));
    let mut depth = 1;
    let end = from_row.find(|c| {
        depth += i32::from(c == '(') - i32::from(c == ')');
        depth == 0
    });
    let (row, tail) = from_row.split_at(end.unwrap_or(from_row.len()));
    (head, row, &tail[1.min(tail.len())..])
}

/// Repeats the row after `VALUES`. Parameters are nameless, because SQLite looks names up one by one.
fn widened(text: &str, rows: usize) -> String {
    let (head, row, tail) = parts(text);
    // What a refused row leaves behind is undone by the caller in any case. Left to SQLite, it would first copy every page that
    // the statement is to change.
    let mut out = format!("{head}VALUES ").replacen(" INTO ", " OR FAIL INTO ", 1);
    for n in 0..rows {
        out.push_str(if n == 0 { "(" } else { ", (" });
        let mut parts = row.split('$');
        out.push_str(parts.next().unwrap_or_default());
        for part in parts {
            out.push('?');
            out.push_str(part.trim_start_matches(|c: char| c.is_ascii_digit()));
        }
        out.push(')');
    }
    out + tail
}

/// Takes the rows out of arrays instead, which are the parameters behind the first `taken`, under a condition if there is one.
fn unnested(text: &str, columns: &[Kind], taken: usize, only_if: &str) -> String {
    let (head, _, tail) = parts(text);
    let arrays: Vec<String> =
        columns.iter().enumerate().map(|(at, kind)| format!("${}::{}[]", taken + at + 1, kind.word())).collect();
    format!("{head}SELECT * FROM UNNEST({}){only_if}{tail}", arrays.join(", "))
}

#[cfg(test)]
mod tests {
    use sqlx::Row as _;

    use super::super::conn::Db;
    use super::super::{SqlStore, blob, job, tables, tidy};
    use super::*;

    const CHANGE: &str = "WITH new (a, b) AS (VALUES (CAST($1 AS TEXT), $2)) SELECT a FROM new WHERE b > 1";

    fn all() -> Vec<&'static Wide> {
        let wides = [&job::CHAIN.links[..], &blob::WIDE[..], &tidy::WIDE[..]].concat();
        let sources =
            [include_str!("job.rs"), include_str!("blob.rs"), include_str!("farm.rs"), include_str!("tidy.rs")];
        let made: usize = sources.iter().map(|source| source.matches("Wide::new(").count()).sum();
        assert_eq!(wides.len(), made, "a wide text is in no list");
        wides.into_iter().chain(tables::TABLES.iter().map(|table| &table.copy)).collect()
    }

    #[test]
    fn a_widened_text_repeats_its_row_and_nothing_else() {
        assert_eq!(
            widened(CHANGE, 2),
            "WITH new (a, b) AS (VALUES (CAST(? AS TEXT), ?), (CAST(? AS TEXT), ?)) SELECT a FROM new WHERE b > 1"
        );
        assert_eq!(
            widened("INSERT INTO t (a) VALUES ($1) ON CONFLICT DO NOTHING", 3),
            "INSERT OR FAIL INTO t (a) VALUES (?), (?), (?) ON CONFLICT DO NOTHING"
        );
    }

    #[test]
    fn an_unnested_text_takes_arrays_and_is_else_the_same() {
        assert_eq!(
            unnested(CHANGE, &[Kind::Text, Kind::Int], 0, ""),
            "WITH new (a, b) AS (SELECT * FROM UNNEST($1::TEXT[], $2::BIGINT[])) SELECT a FROM new WHERE b > 1"
        );
        assert_eq!(
            unnested("INSERT INTO t (a) VALUES ($1) ON CONFLICT DO NOTHING", &[Kind::Flag], 3, " WHERE x"),
            "INSERT INTO t (a) SELECT * FROM UNNEST($4::BOOLEAN[]) WHERE x ON CONFLICT DO NOTHING"
        );
    }

    #[test]
    fn a_chain_counts_or_checks_what_its_guarded_texts_touched() {
        static KEYS: Wide = Wide::new("INSERT INTO k (a) VALUES ($1) ON CONFLICT DO NOTHING", &[Kind::Text]);
        static ROWS: Wide = Wide::new("INSERT INTO r (a, b) VALUES ($1, $2)", &[Kind::Text, Kind::Int]);
        let chain = Chain::new([&KEYS, &KEYS, &KEYS, &KEYS, &ROWS, &ROWS, &ROWS]);
        assert_eq!(
            chain.chained(0b010_0010, Ending::Count),
            "WITH part_1 AS (INSERT INTO k (a) SELECT * FROM UNNEST($2::TEXT[]) ON CONFLICT DO NOTHING RETURNING 1), \
             part_5 AS (INSERT INTO r (a, b) SELECT * FROM UNNEST($3::TEXT[], $4::BIGINT[]) \
             WHERE 0::BIGINT + (SELECT COUNT(*) FROM part_1) + 0::BIGINT + 0::BIGINT = $1) \
             SELECT 0::BIGINT, (SELECT COUNT(*) FROM part_1), 0::BIGINT, 0::BIGINT, $1::BIGINT"
        );
        assert_eq!(
            chain.chained(0b000_0010, Ending::Check),
            "WITH part_1 AS (INSERT INTO k (a) SELECT * FROM UNNEST($2::TEXT[]) RETURNING 1) \
             SELECT 1 / (CASE WHEN 0::BIGINT + (SELECT COUNT(*) FROM part_1) + 0::BIGINT + 0::BIGINT = $1 THEN 1 ELSE 0 END)"
        );
    }

    /// Whatever else stood in a row would be lost where it comes out of arrays.
    #[test]
    fn every_row_is_its_parameters_in_order_and_of_their_kinds() {
        for wide in all() {
            let (_, row, _) = parts(wide.text);
            let given: Vec<&str> = row.split(", ").map(str::trim).collect();
            assert_eq!(given.len(), wide.columns.len(), "{}", wide.text);
            for (at, (given, kind)) in given.iter().zip(wide.columns).enumerate() {
                let plain = format!("${}", at + 1);
                let cast = format!("CAST({plain} AS {})", kind.word());
                assert!(**given == *plain || **given == *cast, "{given}: {}", wide.text);
            }
        }
    }

    #[test]
    fn a_value_of_another_kind_is_refused() {
        let wide = Wide::new(CHANGE, &[Kind::Text, Kind::Int]);
        assert!(wide.whole(Args::new().text("a").int(1).text("b").int(2)).unwrap().is_some());
        assert!(wide.whole(Args::new().int(1).int(1)).is_err());
        assert!(wide.whole(Args::new()).unwrap().is_none());
    }

    #[test]
    fn a_batch_is_cut_into_the_largest_widths() {
        let wide = Wide::new("INSERT INTO t (a, b) VALUES ($1, $2)", &[Kind::Int, Kind::Int]);
        let rows = Args((0..2 * 407).map(|n| Arg::Int(Some(n))).collect());
        let sizes: Vec<usize> = wide.split(rows).map(|(_, args)| args.0.len() / 2).collect();
        assert_eq!(sizes, [256, 128, 16, 4, 2, 1]);
    }

    /// SQLite chooses anew for each width, and with many rows on one side it may choose to walk through the other.
    #[tokio::test]
    async fn every_width_searches_by_an_index() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqlStore::open_sqlite(&dir.path().join("farm.db")).await.unwrap();
        let Db::Sqlite { read, .. } = &store.db else { unreachable!() };
        for (wide, width) in all().iter().flat_map(|wide| WIDTHS.map(|width| (wide, width))) {
            let text = format!("EXPLAIN QUERY PLAN {}", widened(wide.text, width));
            for row in sqlx::query(sqlx::AssertSqlSafe(text)).fetch_all(read).await.unwrap() {
                let step: String = row.get("detail");
                let given = ["new", "closed", "asked", "CONSTANT"];
                let is_given = |what: &str| {
                    given.iter().any(|one| what.starts_with(one))
                        || what.starts_with(|first: char| first.is_ascii_digit())
                };
                let scans = step.strip_prefix("SCAN ").is_some_and(|what| !is_given(what));
                assert!(!scans && !step.contains("AUTOMATIC"), "{width} rows: {step}: {}", wide.text);
            }
        }
    }
}
