//! D: ranges of bytes in headers, read and written.

use std::ops::Range;

/// What a `Range` header asks of `total` bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Asked {
    /// No range, several, or one that cannot be read: all of it is a right answer.
    Whole,
    Part(Range<u64>),
    /// It begins behind the end.
    Nothing,
}

pub(super) fn asked(header: Option<&str>, total: u64) -> Asked {
    let spec = header.and_then(|text| text.trim().strip_prefix("bytes="));
    let Some((first, last)) = spec.and_then(|spec| spec.trim().split_once('-')) else { return Asked::Whole };
    let (first, last) = (first.trim(), last.trim());
    match (number(first), number(last)) {
        (Some(first), Some(last)) if first > last => Asked::Whole,
        (Some(first), Some(_)) if first >= total => Asked::Nothing,
        (Some(first), Some(last)) => Asked::Part(first..total.min(last.saturating_add(1))),
        (Some(first), None) if last.is_empty() && first >= total => Asked::Nothing,
        (Some(first), None) if last.is_empty() => Asked::Part(first..total),
        (None, Some(0)) if first.is_empty() => Asked::Nothing,
        (None, Some(_)) if first.is_empty() && total == 0 => Asked::Nothing,
        (None, Some(tail)) if first.is_empty() => Asked::Part(total.saturating_sub(tail)..total),
        (_, _) => Asked::Whole,
    }
}

/// Where an upload's body stands in the whole: `bytes 5-9/10`, or `bytes */10` for nothing more than the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) offset: u64,
    pub(super) end: u64,
    pub(super) total: u64,
}

pub(super) fn sent(header: &str) -> Option<Sent> {
    let (range, total) = header.trim().strip_prefix("bytes ")?.split_once('/')?;
    let total = number(total)?;
    if range == "*" {
        return Some(Sent { offset: total, end: total, total });
    }
    let (first, last) = range.split_once('-')?;
    let (offset, end) = (number(first)?, number(last)?.checked_add(1)?);
    (offset < end && end <= total).then_some(Sent { offset, end, total })
}

fn number(text: &str) -> Option<u64> {
    (!text.is_empty() && text.bytes().all(|c| c.is_ascii_digit())).then(|| text.parse().ok())?
}

/// `attachment` with the last component of a path as its name, for browsers that read RFC 6266 and those that do not.
pub(super) fn attachment(path: &str) -> String {
    let name = path.rsplit('/').next().unwrap_or(path);
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let fallback: String = name.chars().map(|c| if plain(c) { c } else { '_' }).collect();
    let mut encoded = String::new();
    for byte in name.bytes() {
        match char::from(byte) {
            c if plain(c) => encoded.push(c),
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    format!("attachment; filename=\"{fallback}\"; filename*=UTF-8''{encoded}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_rfc_9110_has_them() {
        for (text, total, want) in [
            ("bytes=0-0", 10, Asked::Part(0..1)),
            ("bytes=5-", 10, Asked::Part(5..10)),
            ("bytes=5-99", 10, Asked::Part(5..10)),
            ("bytes=-3", 10, Asked::Part(7..10)),
            ("bytes=-99", 10, Asked::Part(0..10)),
            ("bytes=10-", 10, Asked::Nothing),
            ("bytes=10-12", 10, Asked::Nothing),
            ("bytes=-0", 10, Asked::Nothing),
            ("bytes=0-", 0, Asked::Nothing),
            ("bytes=-5", 0, Asked::Nothing),
            ("bytes=7-3", 10, Asked::Whole),
            ("bytes=0-1,3-4", 10, Asked::Whole),
            ("bytes=x-3", 10, Asked::Whole),
            ("bytes=+1-3", 10, Asked::Whole),
            ("bytes=-", 10, Asked::Whole),
            ("lines=1-2", 10, Asked::Whole),
            ("bytes=0-18446744073709551615", 10, Asked::Part(0..10)),
            ("bytes=99999999999999999999-", 10, Asked::Whole),
        ] {
            assert_eq!(asked(Some(text), total), want, "{text} of {total}");
        }
        assert_eq!(asked(None, 10), Asked::Whole);
    }

    #[test]
    fn an_uploads_place_adds_up_or_is_refused() {
        assert_eq!(sent("bytes 5-9/10"), Some(Sent { offset: 5, end: 10, total: 10 }));
        assert_eq!(sent("bytes */10"), Some(Sent { offset: 10, end: 10, total: 10 }));
        for wrong in ["", "bytes", "bytes 5-9", "bytes 5-9/*", "bytes 9-5/10", "bytes 5-10/10", "bytes -5/10", "5-9/10"]
        {
            assert_eq!(sent(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn a_files_name_cannot_leave_its_header() {
        for (path, want) in [
            ("a/b/app.txt", "attachment; filename=\"app.txt\"; filename*=UTF-8''app.txt"),
            (
                "x\"; y\r\nEvil: 1.html",
                "attachment; filename=\"x___y__Evil__1.html\"; filename*=UTF-8''x%22%3B%20y%0D%0AEvil%3A%201.html",
            ),
            ("ü.ipa", "attachment; filename=\"_.ipa\"; filename*=UTF-8''%C3%BC.ipa"),
            ("a/%2e%2e", "attachment; filename=\"_2e_2e\"; filename*=UTF-8''%252e%252e"),
        ] {
            assert_eq!(attachment(path), want);
            assert!(axum::http::HeaderValue::from_str(&attachment(path)).is_ok());
        }
    }
}
