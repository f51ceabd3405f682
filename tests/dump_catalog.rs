//! The logical dump of a catalog: the same for catalogs that know the same, another for any other.
//!
//! Invariant: every table and column of the schema is in exactly one of the lists below. Whoever
//! adds a column decides whether a rebuild from the volumes has to bring it back.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use raidtape::catalog::{Extent, Reader, extent};
use raidtape::error::{ErrorKind, Result};
use rusqlite::Connection;
use rusqlite::types::Value as Sql;
use serde_json::{Value, json};

use crate::common::{NOBODY, Sandbox, args, data, is_root, name_of, path_of, tool};

/// Columns whose every change shows in the dump.
const SAID: &[(&str, &[&str])] = &[
    ("settings", &["k", "v"]),
    ("volumes", &["number", "uuid", "path", "status", "reserve_percent"]),
    ("blocks", &["id", "stored_len", "plain_len", "frames"]),
    ("block_copies", &["block", "volume"]),
    ("chunks", &["id", "block", "at", "len"]),
    ("sources", &["name"]),
    ("runs", &["run", "uuid", "path", "started_s", "started_n", "finished_s", "finished_n"]),
    ("runs", &["added", "modified", "deleted", "unchanged"]),
    ("runs", &["dirs_added", "dirs_modified", "dirs_deleted", "dirs_unchanged"]),
    ("runs", &["files", "bytes", "bytes_read", "bytes_stored", "problems"]),
    ("runs", &["host", "program", "comment"]),
    ("run_tags", &["run", "tag"]),
    ("run_problems", &["run", "n", "path", "kind", "message"]),
    ("owners", &["kind", "id", "first_run", "name"]),
    ("entries", &["name", "first_run", "last_run", "version", "kind", "mode", "uid", "gid"]),
    ("entries", &["size", "mtime_s", "mtime_n", "ctime_s", "ctime_n", "ino", "nlink", "rdev"]),
    ("entries", &["data_len"]),
    ("versions", &["hash", "extents", "extra"]),
];
/// Columns that lead from row to row, by numbers that are not said, and what follows from others: a
/// change of one alone shows, or is an error.
const LINKS: &[(&str, &[&str])] = &[
    ("blocks", &["number"]),
    ("sources", &["number"]),
    ("runs", &["source"]),
    ("entries", &["dir", "child"]),
    ("versions", &["version"]),
    ("uses", &["block", "version"]),
    ("attribute_kinds", &["kind"]),
];
/// Columns that a rebuild may fill otherwise.
const FREE: &[(&str, &[&str])] =
    &[("volumes", &["created_s", "index_len"]), ("block_copies", &["record_at"])];
/// The settings of which the same holds.
const FREE_SETTINGS: &[&str] = &["catalog_id", "last_dir", "last_block", "last_manifest"];

/// Rows of a table that are changed at most.
const ROWS_MAX: usize = 12;

/// A store with everything that a catalog can know: several runs of two sources on two volumes.
fn torture() -> Sandbox {
    let sandbox = Sandbox::of_nobody_with(&["--block-size", "1MiB"]);
    let at = |name: &[u8]| sandbox.source.join(path_of(name));
    for dir in [&b"dir \xff\n"[..], b"gone", b"gone/sub", b"turns", b"empty"] {
        fs::create_dir(at(dir)).unwrap();
    }
    for name in [&b"dir \xff\n/half \xe2\x82"[..], b"gone/sub/file", b"turns/file", b"a", b"ab"] {
        fs::write(at(name), name).unwrap();
    }
    fs::write(at(b"nothing"), "").unwrap();
    fs::hard_link(at(b"a"), at(b"gone/second name")).unwrap();
    data::noise_file(&at(b"large"), 7, (2 << 20) + 77);
    let sparse = File::create(at(b"sparse")).unwrap();
    sparse.set_len(3 << 20).unwrap();
    sparse.write_all_at(&[7; 5000], 1 << 20).unwrap();
    sparse.sync_all().unwrap();
    let set = |name: &[u8], key: &str, value: &[u8]| {
        rustix::fs::setxattr(at(name), key, value, rustix::fs::XattrFlags::empty()).unwrap();
    };
    set(b"ab", "user.key", b"value \xff");
    set(b"empty", "user.of a dir", b"");
    tool("setfacl", args!["-m", "u:7:r", &at(b"a")]);
    std::os::unix::fs::symlink(path_of(b"to \xfe"), at(b"link")).unwrap();
    tool("mkfifo", args![&at(b"fifo")]);
    fs::write(at(b"closed"), "nobody reads it").unwrap();
    fs::set_permissions(at(b"closed"), fs::Permissions::from_mode(0o000)).unwrap();
    own(&sandbox);
    let words = ["--tag", "first", "--tag", "\u{20ac}", "--comment", "a \"comment\"\n"];
    let line = args!["backup", &sandbox.source].into_iter();
    sandbox.run(line.chain(words.map(OsString::from))).code(3);

    // From now on the second volume takes the blocks.
    sandbox.add_volume("second volume");
    let conn = Connection::open(&sandbox.catalog).unwrap();
    conn.execute("UPDATE volumes SET status = 'sealed' WHERE number = 1", []).unwrap();
    drop(conn);
    let other = sandbox.path("other");
    fs::create_dir(&other).unwrap();
    data::noise_file(&other.join("file"), 8, 10_000);
    own(&sandbox);
    let name = OsString::from_vec(b"other \xff".to_vec());
    sandbox.ok(["backup".into(), other.into(), "--as".into(), name]);

    fs::remove_dir_all(at(b"gone")).unwrap();
    fs::remove_dir_all(at(b"turns")).unwrap();
    fs::write(at(b"turns"), "into a file").unwrap();
    fs::set_permissions(at(b"closed"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(at(b"empty"), fs::Permissions::from_mode(0o700)).unwrap();
    own(&sandbox);
    sandbox.backup_with(&["--tag", "third"]);
    fs::create_dir_all(at(b"gone/sub")).unwrap();
    fs::write(at(b"gone/sub/file"), "again, and other").unwrap();
    own(&sandbox);
    sandbox.backup();
    sandbox.add_volume("third volume, empty");
    sandbox.assert_valid();
    // No manifest says it, so this comes last.
    let odd = "INSERT INTO owners VALUES ('user', 7, 1, x'ff6e616d65')";
    Connection::open(&sandbox.catalog).unwrap().execute(odd, []).unwrap();
    sandbox
}

/// Gives what this process made to whoever runs the program, and touches nothing else.
fn own(sandbox: &Sandbox) {
    if is_root() {
        let owner = format!("{NOBODY}:{NOBODY}");
        let line = args![&sandbox.path(""), "!", "-uid", NOBODY.to_string(), "-exec"];
        tool("find", line.into_iter().chain(args!["chown", "-h", owner, "{}", "+"]));
    }
}

/// A copy as SQLite makes it, in an order of its own.
fn copy(sandbox: &Sandbox, name: &str) -> (PathBuf, Connection) {
    let path = sandbox.path(name);
    let conn = Connection::open(&sandbox.catalog).unwrap();
    conn.execute("VACUUM INTO ?1", [path.to_str().unwrap()]).unwrap();
    let conn = Connection::open(&path).unwrap();
    let fast = "PRAGMA foreign_keys = OFF; PRAGMA synchronous = OFF;";
    conn.execute_batch(fast).unwrap();
    (path, conn)
}

fn dump(catalog: &Path) -> Result<String> {
    let mut out = Vec::new();
    Reader::open(catalog)?.write_logical_dump(&mut out)?;
    Ok(String::from_utf8(out).unwrap())
}

fn lines_of(text: &str) -> Vec<Value> {
    text.lines().map(|it| serde_json::from_str(it).unwrap()).collect()
}

#[test]
fn a_dump_says_everything_in_a_fixed_order() {
    let sandbox = torture();
    let ran = sandbox.ok(["dump-catalog"]);
    let text = ran.text();
    assert_eq!(text, sandbox.ok(["dump-catalog"]).text());
    assert_eq!(text, dump(&sandbox.catalog).unwrap());
    assert_eq!(text, dump(&copy(&sandbox, "copy").0).unwrap());

    let lines = lines_of(&text);
    let first = json!({ "op": "dump", "format": "raidtape-catalog", "version": 1 });
    assert_eq!(lines[0], first);
    let mut counts = BTreeMap::new();
    for line in &lines[1..lines.len() - 1] {
        *counts.entry(line["op"].as_str().unwrap()).or_insert(0) += 1;
    }
    let end = lines.last().unwrap();
    assert_eq!(end["op"], "end");
    for (op, count) in end.as_object().unwrap().iter().filter(|it| it.0 != "op") {
        assert_eq!(counts.remove(&**op), count.as_u64(), "{op}");
    }
    assert!(counts.is_empty(), "{counts:?}");
    let of = |op: &'static str| lines.iter().filter(move |it| it["op"] == op);

    let volumes: Vec<_> = of("volume").map(|it| (&it["number"], &it["status"])).collect();
    let [sealed, active] = [json!("sealed"), json!("active")];
    let expected = [(&json!(1), &sealed), (&json!(2), &active), (&json!(3), &active)];
    assert_eq!(volumes, expected);
    let runs: Vec<_> = of("run").map(|it| name_of(it, "source")).collect();
    let source = sandbox.source.to_str().unwrap().as_bytes();
    assert_eq!(runs, [source, b"other \xff", source, source]);
    assert_eq!(of("run").next().unwrap()["comment"], "a \"comment\"\n");
    let tags: Vec<_> = of("tag").map(|it| (&it["run"], it["tag"].as_str().unwrap())).collect();
    assert_eq!(tags, [(&json!(1), "first"), (&json!(1), "\u{20ac}"), (&json!(3), "third")]);
    let problem = of("problem").next().unwrap();
    assert_eq!((&problem["run"], &problem["path"]), (&json!(1), &json!("closed")));
    assert!(of("owner").any(|it| name_of(it, "name") == b"\xffname"));

    let entries = |path: &'static [u8]| of("entry").filter(move |it| name_of(it, "path") == path);
    let runs = |path| entries(path).map(|it| json!([it["runs"], it["since"]])).collect::<Vec<_>>();
    assert_eq!(runs(b"gone/sub"), [json!([[1, 2], 1]), json!([[4, null], 4])]);
    assert_eq!(runs(b"turns"), [json!([[1, 2], 1]), json!([[3, null], null])]);
    // The same directory all the time, though its mode is another.
    assert_eq!(runs(b"empty"), [json!([[1, 2], 1]), json!([[3, null], 1])]);
    assert_eq!(runs(b"dir \xff\n/half \xe2\x82"), [json!([[1, null], null])]);
    let version = |path| entries(path).next().unwrap()["version"].clone();
    assert_eq!(version(b"a"), version(b"gone/second name"));
    let content = |path| {
        let number = version(path);
        of("version").find(|it| it["version"] == number).unwrap_or_else(|| panic!("{number}"))
    };
    assert_eq!(name_of(content(b"link"), "target"), b"to \xfe");
    assert_eq!(content(b"ab")["xattrs"][0]["key"], "user.key");
    let sparse = content(b"sparse")["extents"].as_array().unwrap();
    assert!(sparse.len() == 3 && sparse[0][0].is_null() && sparse[2][0].is_null(), "{sparse:?}");
    let blocks: BTreeSet<&str> = of("block").map(|it| it["id"].as_str().unwrap()).collect();
    assert!(blocks.contains(sparse[1][0].as_str().unwrap()));
    assert!(
        blocks.len() >= 5 && of("chunk").all(|it| blocks.contains(it["block"].as_str().unwrap()))
    );
    let on: BTreeSet<_> = of("block").map(|it| it["volumes"].to_string()).collect();
    assert_eq!(on.len(), 2, "{on:?}");
}

/// What a rebuild may do otherwise: other numbers, and another order of everything.
#[test]
fn numbers_of_one_database_are_not_said() {
    let sandbox = torture();
    let before = dump(&sandbox.catalog).unwrap();
    let (path, conn) = copy(&sandbox, "copy");
    let highest: i64 =
        conn.query_row("SELECT max(number) FROM blocks", [], |it| it.get(0)).unwrap();
    assert!(highest < 400);
    let statements = "
        UPDATE blocks SET number = 1000 - number;
        UPDATE block_copies SET block = 1000 - block, record_at = record_at + 13;
        UPDATE chunks SET block = 1000 - block;
        UPDATE uses SET block = 1000 - block;
        UPDATE sources SET number = 100 - number;
        UPDATE runs SET source = 100 - source;
        UPDATE volumes SET index_len = 7, created_s = 0;
        UPDATE settings SET v = 'another' WHERE k = 'catalog_id';
        UPDATE settings SET v = v + 5000 WHERE k IN ('last_dir', 'last_block');
        -- As in a catalog of before, which keeps none.
        DELETE FROM settings WHERE k IN ('last_run', 'last_version');
        INSERT INTO attribute_kinds VALUES ('label');
        -- Stored again after damage: one block with two numbers.
        INSERT INTO blocks SELECT 2000, id, stored_len, plain_len, frames FROM blocks
            WHERE number = 999;
        INSERT INTO block_copies SELECT 2000, volume, 5 FROM block_copies WHERE block = 999;
        UPDATE chunks SET block = 2000 WHERE block = 999 AND at > 0;";
    conn.execute_batch(statements).unwrap();
    renumber_extents(&conn);
    renumber_dirs(&conn);
    drop(conn);
    assert_eq!(dump(&path).unwrap(), before);
}

fn renumber_extents(conn: &Connection) {
    let query = "SELECT version, extents FROM versions WHERE extents IS NOT NULL";
    let mut statement = conn.prepare(query).unwrap();
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    let rows: Vec<(i64, Vec<u8>)> = rows.map(|it| it.unwrap()).collect();
    for (version, bytes) in rows {
        let mut extents = extent::decode(&bytes).unwrap();
        for extent in &mut extents {
            if let Extent::Data { block, .. } = extent {
                *block = 1000 - *block;
            }
        }
        let query = "UPDATE versions SET extents = ?2 WHERE version = ?1";
        conn.execute(query, (version, extent::encode(&extents))).unwrap();
    }
}

/// Gives directories other numbers in another order; each is still greater than the one above.
fn renumber_dirs(conn: &Connection) {
    let query = "SELECT DISTINCT child, dir FROM entries WHERE child IS NOT NULL";
    let mut statement = conn.prepare(query).unwrap();
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    let above: BTreeMap<i64, i64> = rows.map(|it| it.unwrap()).collect();
    let depth = |dir: &i64| std::iter::successors(Some(dir), |it| above.get(it)).count();
    let mut dirs: Vec<i64> = above.keys().copied().collect();
    dirs.sort_by_key(|it| (depth(it), -it));
    assert!(!dirs.is_sorted() && dirs.len() >= 8, "{dirs:?}");
    for (new, old) in (100_000..).zip(dirs) {
        conn.execute("UPDATE entries SET dir = ?2 WHERE dir = ?1", (old, new)).unwrap();
        conn.execute("UPDATE entries SET child = ?2 WHERE child = ?1", (old, new)).unwrap();
    }
}

/// The schema's tables and columns, in the order of the key where they belong to one.
fn columns(conn: &Connection) -> Vec<(String, String)> {
    let query = "SELECT t.name, c.name FROM sqlite_schema t, pragma_table_info(t.name) c \
                 WHERE t.type = 'table' AND t.name NOT LIKE 'sqlite_%' ORDER BY t.name, c.cid";
    let mut statement = conn.prepare(query).unwrap();
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    rows.map(|it| it.unwrap()).collect()
}

fn is_in(list: &[(&str, &[&str])], table: &str, column: &str) -> bool {
    list.iter().any(|it| it.0 == table && it.1.contains(&column))
}

/// Another value that a column can have too.
fn another(table: &str, column: &str, value: &Sql) -> Option<Sql> {
    Some(match (table, column, value) {
        ("volumes", "status", _) => Sql::Text("missing".into()),
        ("owners", "kind", Sql::Text(kind)) => {
            Sql::Text(if kind == "user" { "group" } else { "user" }.into())
        }
        ("entries", "kind", Sql::Integer(kind)) => match kind {
            // Anything else would need a directory number.
            2 => return None,
            1 => Sql::Integer(4),
            _ => Sql::Integer(1),
        },
        ("block_copies" | "chunks", "block" | "volume", Sql::Integer(n)) => {
            Sql::Integer(if *n == 1 { 2 } else { 1 })
        }
        ("volumes", "reserve_percent", Sql::Integer(n)) => Sql::Integer(n + 1),
        (_, _, Sql::Integer(n)) => Sql::Integer(if *n > 1 << 62 { n - 1 } else { n + 1000 }),
        ("settings", "v", Sql::Text(text)) => match text.parse::<i64>() {
            Ok(number) => Sql::Text((number + 1).to_string()),
            Err(_) => Sql::Text(format!("{text}x")),
        },
        (_, _, Sql::Text(text)) => Sql::Text(format!("{text}x")),
        (_, _, Sql::Blob(bytes)) => {
            let mut bytes = bytes.clone();
            *bytes.last_mut()? ^= 1;
            Sql::Blob(bytes)
        }
        (_, _, Sql::Null | Sql::Real(_)) => return None,
    })
}

/// The keys of the first rows that have something in a column, and what they have.
fn values(conn: &Connection, table: &str, column: &str) -> Vec<(Vec<(String, Sql)>, Sql)> {
    let query = "SELECT name FROM pragma_table_info(?1) WHERE pk > 0 ORDER BY pk";
    let mut statement = conn.prepare(query).unwrap();
    let keys = statement.query_map([table], |row| row.get(0)).unwrap();
    let keys: Vec<String> = keys.map(|it| it.unwrap()).collect();
    let list = keys.join(", ");
    let query =
        format!("SELECT {list}, {column} FROM {table} WHERE {column} IS NOT NULL ORDER BY {list}");
    let mut statement = conn.prepare(&query).unwrap();
    let rows = statement
        .query_map([], |row| {
            let key = (0..).zip(&keys).map(|(at, key)| Ok((key.clone(), row.get(at)?)));
            Ok((key.collect::<rusqlite::Result<_>>()?, row.get(keys.len())?))
        })
        .unwrap();
    let rows: Vec<_> = rows.map(|it| it.unwrap()).collect();
    let step = rows.len().div_ceil(ROWS_MAX).max(1);
    rows.into_iter().step_by(step).collect()
}

/// Sets a column of the row with this key; `false` if another row is in the way.
fn set(conn: &Connection, (table, column): (&str, &str), key: &[(String, Sql)], to: &Sql) -> bool {
    let places: Vec<String> =
        (2..).zip(key).map(|(at, (name, _))| format!("{name} = ?{at}")).collect();
    let query = format!("UPDATE {table} SET {column} = ?1 WHERE {}", places.join(" AND "));
    let params = std::iter::once(to).chain(key.iter().map(|it| &it.1));
    match conn.execute(&query, rusqlite::params_from_iter(params)) {
        Ok(changed) => {
            assert_eq!(changed, 1, "{table}.{column}");
            true
        }
        Err(e) => {
            let code = e.sqlite_error_code();
            assert_eq!(code, Some(rusqlite::ErrorCode::ConstraintViolation), "{table}: {e}");
            false
        }
    }
}

#[test]
fn every_column_is_said_or_is_known_not_to_be() {
    let sandbox = torture();
    let (path, conn) = copy(&sandbox, "copy");
    let before = dump(&path).unwrap();
    let mut faults = Vec::new();
    for (table, column) in columns(&conn) {
        let at = (&*table, &*column);
        let [said, link, free] = [SAID, LINKS, FREE].map(|it| is_in(it, at.0, at.1));
        if [said, link, free].into_iter().filter(|it| *it).count() != 1 {
            faults.push(format!("{table}.{column}: does a rebuild bring it back? Decide"));
            continue;
        }
        // How often it was changed, and how often the dump was another.
        let (mut tried, mut differed) = (0, 0);
        for (mut key, value) in values(&conn, at.0, at.1) {
            let is_free = free
                || at == ("settings", "v")
                    && matches!(&key[0].1, Sql::Text(it) if FREE_SETTINGS.contains(&&**it));
            let Some(other) = another(at.0, at.1, &value) else { continue };
            if !set(&conn, at, &key, &other) {
                continue;
            }
            tried += 1;
            let what = format!("{table}.{column}: {value:?} became {other:?}");
            match dump(&path) {
                Ok(now) if is_free == (now == before) => differed += u32::from(!is_free),
                Ok(_) => faults.push(what.clone()),
                Err(e) if !is_free && e.kind() == ErrorKind::Corrupt => {}
                Err(e) => faults.push(format!("{what}: {e}")),
            }
            key.iter_mut().filter(|it| it.0 == column).for_each(|it| it.1 = other.clone());
            assert!(set(&conn, at, &key, &value), "{what}: back");
        }
        if tried == 0 || said && differed == 0 {
            faults.push(format!("{table}.{column}: {tried} changes, {differed} of them shown"));
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    let known: BTreeSet<_> = columns(&conn).into_iter().collect();
    let decided = [SAID, LINKS, FREE].concat();
    let decided = decided.iter().flat_map(|(table, list)| list.iter().map(move |it| (*table, *it)));
    let decided: BTreeSet<_> = decided.map(|it| (it.0.to_owned(), it.1.to_owned())).collect();
    assert_eq!(known, decided);
    assert_eq!(dump(&path).unwrap(), before);
}

#[test]
fn a_damaged_catalog_has_no_dump_and_says_why() {
    let sandbox = torture();
    for (damage, words) in [
        ("DELETE FROM blocks WHERE number = 1", "block 1 is missing"),
        ("DELETE FROM volumes WHERE number = 2", "a volume of "),
        ("DELETE FROM sources WHERE number = 2", "the source of run 2 is missing"),
        ("DELETE FROM entries WHERE name = x'676f6e65'", "in directories that are not there"),
        (
            "UPDATE entries SET child = (SELECT child FROM entries WHERE name = x'64697220ff0a') \
             WHERE name = x'656d707479'",
            "'dir \\xff\\n' in it is elsewhere too",
        ),
        ("UPDATE entries SET kind = 9 WHERE name = x'66696c65'", "an impossible kind"),
        ("UPDATE entries SET mtime_n = -1 WHERE name = x'61'", "out of range"),
        ("UPDATE versions SET extents = x'ff' WHERE extents IS NOT NULL", "catalog: version "),
        ("UPDATE versions SET extra = x'77' WHERE extra IS NOT NULL", "unknown tag"),
        ("UPDATE blocks SET frames = x'0101'", "frame table"),
        ("DELETE FROM uses WHERE block = 1", "its use of block 1 is not noted"),
        ("INSERT INTO uses VALUES (1, 99999)", "rows of uses"),
        ("INSERT INTO block_copies VALUES (99999, 1, 0)", "rows of block_copies"),
        ("DELETE FROM attribute_kinds", "an attribute of a kind"),
        ("UPDATE settings SET v = 'x' WHERE k = 'last_run'", "setting last_run"),
        ("UPDATE run_tags SET tag = CAST(x'ff' AS TEXT) WHERE run = 3", "tag is no text"),
    ] {
        let (path, conn) = copy(&sandbox, "copy");
        dump(&path).unwrap();
        assert!(conn.execute(damage, []).unwrap() > 0, "{damage}");
        let error = dump(&path).unwrap_err();
        let text = error.to_string();
        assert!(error.kind() == ErrorKind::Corrupt && text.contains(words), "{damage}: {text}");
        drop(conn);
        fs::remove_file(path).unwrap();
    }
    // By the program: nothing says that it is whole.
    let conn = Connection::open(&sandbox.catalog).unwrap();
    conn.execute_batch("PRAGMA foreign_keys = OFF; DELETE FROM uses").unwrap();
    drop(conn);
    let ran = sandbox.run(["dump-catalog"]).code(5);
    assert!(ran.errors().contains("is not noted"), "{}", ran.errors());
    assert!(!ran.text().contains("\"op\":\"end\"") && ran.text().starts_with("{\"op\":\"dump\""));
    fs::remove_file(&sandbox.catalog).unwrap();
    sandbox.run(["dump-catalog"]).code(10);
}
