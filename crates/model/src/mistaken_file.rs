//! What a file is that is not what its name says: a pointer where weights should be, a page about a download. Asked when
//! a model's file does not parse, so that a person is told what is there and not at which byte it is no JSON.

/// How many bytes of a file's beginning are looked at.
pub const HEAD_BYTES: usize = 256;

/// What `head`, the first [`HEAD_BYTES`] of a file or all of it, gives away; `None` where it may be what it should be.
pub fn recognise(head: &[u8]) -> Option<&'static str> {
    let head = &head[..head.len().min(HEAD_BYTES)];
    let text = head.strip_prefix(b"\xef\xbb\xbf").unwrap_or(head).trim_ascii_start();
    let begins = |with: &str| text.get(..with.len()).is_some_and(|text| text.eq_ignore_ascii_case(with.as_bytes()));
    if head.is_empty() {
        Some("empty")
    } else if begins("version https://git-lfs.github.com/spec/") {
        Some("a Git LFS pointer: `git lfs pull` fetches the file it stands for")
    } else if begins("<!doctype html") || begins("<html") {
        Some("an HTML page: a download got a page about the file, or about an error")
    } else if begins("<?xml") || begins("<error") {
        Some("XML: a download got a server's error")
    } else if head.starts_with(b"PK\x03\x04") {
        Some("a zip archive, as pytorch_model.bin is: `sida convert` makes safetensors of such a checkpoint")
    } else if head.starts_with(b"GGUF") {
        Some("a GGUF file: `sida convert` makes a model directory of it")
    } else if head.starts_with(b"\x1f\x8b") {
        Some("compressed with gzip: unpack it")
    } else if head.iter().all(|&byte| byte == 0) {
        Some("zeros from its first byte on: a download or a copy was broken off")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_a_files_place_is_recognised() {
        // Broken: a person would be told of a header of two exabytes, or that no value is at line 1.
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13\n";
        for (head, expected) in [
            (&b""[..], "empty"),
            (pointer, "Git LFS pointer"),
            (b"\n<!DOCTYPE html>\n<html>", "HTML page"),
            (b"\xef\xbb\xbf<HTML lang=en>", "HTML page"),
            (b"<?xml version=\"1.0\"?><Error><Code>AccessDenied</Code>", "server's error"),
            (b"PK\x03\x04\0\0", "zip archive"),
            (b"GGUF\x03\0\0\0", "GGUF file"),
            (b"\x1f\x8b\x08\0", "gzip"),
            (&[0; 4096], "zeros"),
        ] {
            let found = recognise(head).unwrap_or_else(|| panic!("{expected} was not recognised"));
            assert!(found.contains(expected), "{found} does not say {expected}");
        }
        for fine in [&b"{\"architectures\": []}"[..], b"\x80\x01\0\0\0\0\0\0{\"", b"version 2", b"<", b"P"] {
            assert_eq!(recognise(fine), None, "{fine:?}");
        }
    }
}
