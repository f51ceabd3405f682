-- What is on tapes, schema version 1. See FORMAT.md beside this file.

CREATE TABLE tapes (
    number INTEGER PRIMARY KEY,
    label BLOB NOT NULL UNIQUE CHECK (length(label) BETWEEN 1 AND 1024),
    hash BLOB NOT NULL CHECK (length(hash) = 32),
    pool TEXT NOT NULL,
    block_bytes INTEGER NOT NULL CHECK (block_bytes > 0),
    is_lost INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TABLE tape_files (
    number INTEGER PRIMARY KEY,
    tape INTEGER NOT NULL REFERENCES tapes,
    filenum INTEGER NOT NULL CHECK (filenum >= 0),
    position INTEGER NOT NULL CHECK (position >= 0),
    bytes INTEGER NOT NULL CHECK (bytes >= 0),
    job TEXT NOT NULL,
    batch INTEGER NOT NULL CHECK (batch >= 0),
    ended_s INTEGER NOT NULL,
    verified_s INTEGER,
    UNIQUE (tape, filenum)
) STRICT;

CREATE TABLE members (
    tape_file INTEGER NOT NULL REFERENCES tape_files,
    at INTEGER NOT NULL CHECK (at >= 0),
    len INTEGER NOT NULL CHECK (len >= 0),
    block BLOB CHECK (length(block) = 32),
    name BLOB CHECK (length(name) BETWEEN 1 AND 4096),
    digest BLOB CHECK (length(digest) = 32),
    is_bad INTEGER NOT NULL DEFAULT 0,
    PRIMARY KEY (tape_file, at),
    CHECK ((block IS NULL) <> (name IS NULL)),
    CHECK ((name IS NULL) = (digest IS NULL))
) STRICT, WITHOUT ROWID;
CREATE INDEX members_block ON members (block) WHERE block IS NOT NULL;
CREATE INDEX members_name ON members (name) WHERE name IS NOT NULL;
