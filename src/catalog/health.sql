-- Health of block copies, schema version 1. See FORMAT.md beside this file.

CREATE TABLE copies (
    volume TEXT NOT NULL,
    block BLOB NOT NULL CHECK (length(block) = 32),
    verified_s INTEGER,
    bad_s INTEGER,
    reason TEXT CHECK ((reason IS NULL) = (bad_s IS NULL)),
    PRIMARY KEY (volume, block)
) STRICT, WITHOUT ROWID;
CREATE INDEX copies_verified ON copies (verified_s);
CREATE INDEX copies_bad ON copies (volume, block) WHERE bad_s IS NOT NULL;
