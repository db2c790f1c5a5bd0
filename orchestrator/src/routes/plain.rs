//! D: what a parser says, in words for somebody who never saw the parser.

/// What a parser of JSON calls text that is none.
const NO_JSON: [&str; 13] = [
    "EOF while",
    "expected ",
    "key must be",
    "trailing c",
    "control character",
    "invalid escape",
    "invalid number",
    "invalid unicode",
    "lone leading surrogate",
    "unexpected end of hex",
    "number out of range",
    "recursion limit",
    "float key",
];
const NO_NUMBER: [&str; 4] = ["invalid digit", "number too", "cannot parse integer", "invalid float"];

/// The sentence of serde's or serde_json's without its jargon.
pub(super) fn plain(said: &str) -> String {
    let (what, place) = match said.rsplit_once(" at line ") {
        Some((what, place)) => (what, format!(" (line {})", place.replace(" column", ", column"))),
        None => (said, String::new()),
    };
    let what = after_value(what);
    if NO_JSON.iter().any(|start| what.starts_with(start)) {
        return format!("this is no JSON{place}: {what}");
    }
    if NO_NUMBER.iter().any(|start| what.starts_with(start)) {
        return "is a whole number".to_owned();
    }
    if let Some(name) = what.strip_prefix("missing field ") {
        return format!("{name} is missing");
    }
    if let Some(name) = what.strip_prefix("duplicate field ") {
        return format!("{name} is there twice");
    }
    if let Some(rest) = what.strip_prefix("unknown field ") {
        return one_of(rest, "is not known here; known are");
    }
    if let Some(rest) = what.strip_prefix("unknown variant ") {
        return one_of(rest, "is not one of");
    }
    let wrong = ["invalid type: ", "invalid value: "].iter().find_map(|start| what.strip_prefix(start));
    match wrong.and_then(|rest| rest.rsplit_once(", expected ")) {
        Some((found, expected)) => format!("is {}, not {}", noun(expected), noun(found)),
        None => what.to_owned(),
    }
}

/// What was wrong with a part of a path, without the part.
fn after_value(what: &str) -> &str {
    let behind = what.strip_prefix("Cannot parse ").and_then(|rest| rest.split_once("`: "));
    behind.map_or(what, |(_, why)| why)
}

/// "`x`, expected one of `a`, `b`".
fn one_of(rest: &str, verb: &str) -> String {
    let Some((name, list)) = rest.split_once(", expected ") else {
        let (name, _) = rest.split_once(", ").unwrap_or((rest, ""));
        return format!("{name} is not known here");
    };
    let list = list.strip_prefix("one of ").unwrap_or(list).replace('`', "");
    format!("{name} {verb} {list}")
}

fn noun(kind: &str) -> &str {
    match kind {
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number from 0",
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number",
        "f32" | "f64" => "a number",
        "a string" | "a borrowed string" | "string" => "text",
        "a boolean" => "true or false",
        "map" | "a map" => "an object",
        "sequence" | "a sequence" => "a list",
        "unit value" | "null" | "unit" => "null",
        other if other.starts_with("struct ") => "an object",
        other if other.starts_with("enum ") => "a word",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn no_sentence_needs_a_dictionary() {
        for (said, plainly) in [
            ("missing field `role` at line 1 column 12", "`role` is missing"),
            ("duplicate field `name` at line 1 column 12", "`name` is there twice"),
            (
                "unknown field `rolle`, expected one of `name`, `role` at line 1 column 9",
                "`rolle` is not known here; known are name, role",
            ),
            ("unknown field `x`, expected `wait`", "`x` is not known here; known are wait"),
            ("unknown field `x`, there are no fields", "`x` is not known here"),
            (
                "unknown variant `king`, expected one of `viewer`, `admin` at line 1 column 2",
                "`king` is not one of viewer, admin",
            ),
            (
                "invalid type: string \"long\", expected u64 at line 1 column 2",
                "is a whole number from 0, not string \"long\"",
            ),
            (
                "invalid value: integer `-1`, expected u32 at line 1 column 2",
                "is a whole number from 0, not integer `-1`",
            ),
            ("invalid type: sequence, expected struct SubmitJob at line 1 column 0", "is an object, not a list"),
            ("invalid type: null, expected a string at line 1 column 2", "is text, not null"),
            (
                "EOF while parsing an object at line 1 column 1",
                "this is no JSON (line 1, column 1): EOF while parsing an object",
            ),
            ("trailing characters at line 1 column 13", "this is no JSON (line 1, column 13): trailing characters"),
            ("invalid digit found in string", "is a whole number"),
            (
                "Cannot parse `id` with value `mini`: a worker id is written wkr_ and 26 characters",
                "a worker id is written wkr_ and 26 characters",
            ),
            (
                "a token id is written tok_ and 26 characters at line 2 column 3",
                "a token id is written tok_ and 26 characters",
            ),
        ] {
            assert_eq!(plain(said), plainly);
        }
    }
}
