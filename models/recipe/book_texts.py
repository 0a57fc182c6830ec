"""Readers of books and articles: every document as paragraphs of plain text, written one way whatever the source.

    .txt    a book; blank lines between paragraphs, as Project Gutenberg has them
    .xml    a book in TEI
    .xhtml  a chapter or a story, as Standard Ebooks has them
"""

import re
from xml.etree import ElementTree

PARAGRAPHS = {"p", "h1", "h2", "h3", "h4"}
NOT_TEXT = {"note", "front", "back", "teiHeader", "fw", "head"}  # head: a heading in TEI, what is not shown in XHTML
NOT_STORIES = {"colophon", "imprint", "uncopyright", "titlepage", "halftitlepage", "toc", "endnotes", "loi", "dedication", "epigraph"}
PARAGRAPH_CHARACTERS = 60  # of letters: two books whose paragraphs begin alike by so many are one

# Quotes and dashes that a keyboard has, so that a prompt is written as the text was.
PLAIN = str.maketrans({
    "“": '"', "”": '"', "‘": "'", "’": "'", "…": "...", "—": "--", "―": "--", "–": "-", "‐": "-", "‑": "-", "⸺": "--",
    "⸻": "--", "`": "'", "´": "'", "ſ": "s", "\u00a0": " ", "\u200a": " ", "\u2009": " ", "\u202f": " ", "\u2060": None,
    "\ufeff": None, "\u00ad": None, "_": None, "*": None,
})


def plain(text):
    text = re.sub(r"\s+", " ", text.translate(PLAIN)).strip().replace("''", '"')
    return re.sub(r"-{3,}", "--", text)


def paragraphs_of(path):
    """-> the paragraphs of one file, in order, none empty."""
    if path.suffix == ".txt":
        found = re.split(r"\n\s*\n", path.read_text(encoding="utf-8-sig"))
    else:
        found = marked_up(ElementTree.parse(path).getroot())
    return [text for text in map(plain, found) if re.search(r"[A-Za-z]", text)]


def marked_up(element):
    """-> the text of each paragraph below an element of TEI or XHTML, notes and their marks left out."""
    name = element.tag.rpartition("}")[2] if isinstance(element.tag, str) else "note"
    if name in NOT_TEXT:
        return []
    if name in PARAGRAPHS:
        return ["".join(text_within(element))]
    return [text for child in element for text in marked_up(child)]


def text_within(element):
    yield element.text or ""
    for child in element:
        name = child.tag.rpartition("}")[2] if isinstance(child.tag, str) else "note"
        if name == "br":
            yield " "
        elif name not in NOT_TEXT and not any("noteref" in value for value in child.attrib.values()):
            yield from text_within(child)
        yield child.tail or ""


def books(directory):
    """-> [(book, text)]: every book, chapter or story below a directory. What repeats another one is left out."""
    seen, out = set(), []
    for path in sorted(directory.rglob("*")):
        if path.suffix not in (".txt", ".xml", ".xhtml") or path.stem in NOT_STORIES:
            continue
        paragraphs = paragraphs_of(path)
        keys = [key for key in map(key_of, paragraphs) if len(key) == PARAGRAPH_CHARACTERS]
        if not keys or sum(key in seen for key in keys) > len(keys) / 10:
            continue
        seen.update(keys)
        book = path.parent if path.suffix == ".xhtml" else path
        out.append((str(book.relative_to(directory)), "\n".join(paragraphs)))
    return out


def key_of(paragraph):
    return re.sub(r"[^a-z]", "", paragraph.lower())[:PARAGRAPH_CHARACTERS]


def articles(path):
    """-> [(name, text)]: the lines of a file that begin with their title, ` -- ` and the text."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [(line.split(" -- ")[0], plain(line)) for line in lines if " -- " in line and len(line) >= 200]


def sentence_length(text):
    """Characters a sentence: how hard a text is to read, and to learn from."""
    return len(text) / (1 + len(re.findall(r"[.!?]", text)))
