-- Catalog, schema version 1. See FORMAT.md beside this file for what the columns mean.

CREATE TABLE settings (
    k TEXT PRIMARY KEY,
    v TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE volumes (
    number INTEGER PRIMARY KEY,
    uuid TEXT NOT NULL UNIQUE,
    path BLOB NOT NULL,
    status TEXT NOT NULL CHECK (status IN ('active', 'sealed', 'missing')),
    reserve_percent INTEGER NOT NULL CHECK (reserve_percent BETWEEN 0 AND 100),
    created_s INTEGER NOT NULL,
    index_len INTEGER NOT NULL DEFAULT 0
) STRICT;

CREATE TABLE blocks (
    number INTEGER PRIMARY KEY,
    id BLOB NOT NULL CHECK (length(id) = 32),
    stored_len INTEGER NOT NULL CHECK (stored_len > 0),
    plain_len INTEGER NOT NULL CHECK (plain_len > 0),
    frames BLOB NOT NULL
) STRICT;
CREATE INDEX blocks_id ON blocks (id);

CREATE TABLE block_copies (
    block INTEGER NOT NULL REFERENCES blocks,
    volume INTEGER NOT NULL REFERENCES volumes,
    record_at INTEGER NOT NULL,
    PRIMARY KEY (block, volume)
) STRICT, WITHOUT ROWID;

CREATE TABLE chunks (
    id BLOB PRIMARY KEY CHECK (length(id) = 32),
    block INTEGER NOT NULL REFERENCES blocks,
    at INTEGER NOT NULL,
    len INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE sources (
    number INTEGER PRIMARY KEY,
    name BLOB NOT NULL UNIQUE
) STRICT;

CREATE TABLE runs (
    run INTEGER PRIMARY KEY,
    uuid TEXT NOT NULL UNIQUE,
    source INTEGER NOT NULL REFERENCES sources,
    path BLOB NOT NULL,
    started_s INTEGER NOT NULL,
    started_n INTEGER NOT NULL,
    finished_s INTEGER NOT NULL,
    finished_n INTEGER NOT NULL,
    added INTEGER NOT NULL,
    modified INTEGER NOT NULL,
    deleted INTEGER NOT NULL,
    unchanged INTEGER NOT NULL,
    dirs_added INTEGER NOT NULL,
    dirs_modified INTEGER NOT NULL,
    dirs_deleted INTEGER NOT NULL,
    dirs_unchanged INTEGER NOT NULL,
    files INTEGER NOT NULL,
    bytes INTEGER NOT NULL,
    bytes_read INTEGER NOT NULL,
    bytes_stored INTEGER NOT NULL,
    problems INTEGER NOT NULL,
    host BLOB NOT NULL,
    program TEXT NOT NULL
) STRICT;

CREATE TABLE run_tags (
    run INTEGER NOT NULL REFERENCES runs,
    tag TEXT NOT NULL,
    PRIMARY KEY (run, tag)
) STRICT, WITHOUT ROWID;

CREATE TABLE run_problems (
    run INTEGER NOT NULL REFERENCES runs,
    n INTEGER NOT NULL,
    path BLOB NOT NULL,
    kind TEXT NOT NULL,
    message TEXT NOT NULL,
    PRIMARY KEY (run, n)
) STRICT, WITHOUT ROWID;

CREATE TABLE owners (
    kind TEXT NOT NULL CHECK (kind IN ('user', 'group')),
    id INTEGER NOT NULL,
    first_run INTEGER NOT NULL,
    name BLOB NOT NULL,
    PRIMARY KEY (kind, id, first_run)
) STRICT, WITHOUT ROWID;

CREATE TABLE entries (
    dir INTEGER NOT NULL,
    name BLOB NOT NULL,
    first_run INTEGER NOT NULL,
    last_run INTEGER NOT NULL CHECK (last_run >= first_run),
    version INTEGER NOT NULL,
    child INTEGER,
    kind INTEGER NOT NULL,
    mode INTEGER NOT NULL,
    uid INTEGER NOT NULL,
    gid INTEGER NOT NULL,
    size INTEGER NOT NULL,
    mtime_s INTEGER NOT NULL,
    mtime_n INTEGER NOT NULL,
    ctime_s INTEGER NOT NULL,
    ctime_n INTEGER NOT NULL,
    ino INTEGER NOT NULL,
    nlink INTEGER NOT NULL,
    rdev INTEGER NOT NULL,
    data_len INTEGER,
    PRIMARY KEY (dir, name, first_run)
) STRICT, WITHOUT ROWID;
CREATE INDEX entries_version ON entries (version);
CREATE INDEX entries_child ON entries (child) WHERE child IS NOT NULL;
CREATE INDEX entries_closed ON entries (last_run) WHERE last_run < 9223372036854775807;

CREATE TABLE versions (
    version INTEGER PRIMARY KEY,
    hash BLOB CHECK (hash IS NULL OR length(hash) = 32),
    extents BLOB,
    extra BLOB
) STRICT;

CREATE TABLE uses (
    block INTEGER NOT NULL,
    version INTEGER NOT NULL,
    PRIMARY KEY (block, version)
) STRICT, WITHOUT ROWID;
