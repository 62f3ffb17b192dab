# nbdkit-dirty-bitmap-filter
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-dirty-bitmap-filter authors

"""A strict reader of Prometheus's text format, version 0.0.4.  It takes
less than Prometheus does: what it takes, every reader of the format
does."""

import re

NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"')
VALUE = re.compile(r"(?:NaN|[0-9]+(?:\.[0-9]+)?)\Z")
ESCAPE = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


def unescape(text):
    return re.sub(r'\\[\\"n]', lambda m: ESCAPE[m.group()], text)


def read_labels(text):
    """The labels between braces; all of text is taken."""
    labels = {}
    while True:
        m = LABEL.match(text)
        assert m, "bad label: %r" % text
        assert m[1] not in labels, "label %s is there twice" % m[1]
        labels[m[1]] = unescape(m[2])
        if m.end() == len(text):
            return labels
        assert text[m.end()] == ",", text
        text = text[m.end() + 1:]


def sample(line):
    """One line: the name, the labels, the value."""
    head, _, value = line.rpartition(" ")
    assert VALUE.match(value), "bad value: %r" % line
    name = NAME.match(head)
    assert name, "bad name: %r" % line
    rest = head[name.end():]
    labels = {}
    if rest:
        assert rest[0] == "{" and rest[-1] == "}", line
        labels = read_labels(rest[1:-1])
    return name.group(), labels, float(value)


def parse(data, prefix):
    """The samples of a file: {(name, frozenset of labels): value}."""
    text = data.decode("utf-8")          # strictly
    assert text.endswith("\n"), "the last line has no end"
    for c in text:
        assert c == "\n" or c >= " " and c != "\x7f", "control character"
    samples, seen = {}, set()
    family = kind = helped = None
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            helped, _, doc = line[7:].partition(" ")
            assert NAME.fullmatch(helped) and helped.startswith(prefix), line
            assert doc and "\\" not in doc, line
            assert helped not in seen, "%s is there twice" % helped
            seen.add(helped)
            family = None
        elif line.startswith("# TYPE "):
            family, kind = line[7:].split(" ")
            assert family == helped, "TYPE without its HELP: " + line
            assert kind in ("counter", "gauge", "summary"), line
            assert (kind == "counter") == family.endswith("_total"), line
        else:
            name, labels, value = sample(line)
            assert family is not None, "no TYPE: " + line
            if kind == "summary" and name == family:
                assert 0 <= float(labels["quantile"]) <= 1
            elif kind == "summary":
                assert name in (family + "_sum", family + "_count"), line
                assert "quantile" not in labels
            else:
                assert name == family, line
            key = name, frozenset(labels.items())
            assert key not in samples, "twice: " + line
            samples[key] = value
    assert samples
    return samples
