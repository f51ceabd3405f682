-- Kept jobs, schema version 1. See FORMAT.md beside this file.

CREATE TABLE jobs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    verb TEXT NOT NULL,
    line BLOB NOT NULL,
    uid INTEGER NOT NULL,
    asked_s INTEGER NOT NULL,
    process TEXT NOT NULL,
    state TEXT CHECK (state IN ('done', 'failed', 'cancelled')),
    status TEXT,
    log TEXT
) STRICT;
CREATE INDEX jobs_open ON jobs (id) WHERE state IS NULL;

CREATE TABLE access (
    name TEXT PRIMARY KEY,
    mode INTEGER,
    uid INTEGER,
    gid INTEGER
) STRICT, WITHOUT ROWID;
