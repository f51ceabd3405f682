//! Every paragraph of `docs/semantics.md` names the tests that hold it, and they exist.

use std::fs;
use std::path::Path;

/// What a paragraph that nobody has tried says of itself.
const UNTRIED: &str = "(untried)";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The tests that a paragraph names at its end, as `(test: a::b)` or `(tests: a::b, c::d)`.
fn named(paragraph: &str) -> Vec<String> {
    let text = paragraph.split_whitespace().collect::<Vec<_>>().join(" ");
    let marks = ["(test: ", "(tests: "];
    let list = marks.iter().find_map(|mark| text.rsplit_once(mark)?.1.strip_suffix(')'));
    let list = list.unwrap_or_default().split(", ");
    list.filter(|it| !it.is_empty()).map(str::to_owned).collect()
}

/// Whether `module::name` is a test below `tests`.
fn exists(test: &str) -> bool {
    let Some((module, name)) = test.split_once("::") else { return false };
    let text = fs::read_to_string(root().join(format!("tests/{module}.rs"))).unwrap_or_default();
    text.contains(&format!("#[test]\nfn {name}() {{"))
}

#[test]
fn the_marks_are_read() {
    assert_eq!(named("Words. (test: a::b)"), ["a::b"]);
    assert_eq!(named("Words\n(not these). (tests:\na::b,\nc::d)"), ["a::b", "c::d"]);
    assert!(named("Words (test: a::b) and more.").is_empty());
    assert!(exists("promises::the_marks_are_read"));
    assert!(!exists("promises::the_marks") && !exists("promises::root") && !exists("root"));
}

#[test]
fn every_paragraph_of_the_semantics_has_its_test() {
    let text = fs::read_to_string(root().join("docs/semantics.md")).unwrap();
    // Before the first section is what the document is.
    let (_, sections) = text.split_once("\n## ").unwrap();
    let mut faults = Vec::new();
    let mut count = 0;
    for paragraph in sections.split("\n\n").skip(1).map(str::trim) {
        if paragraph.starts_with("## ") {
            continue;
        }
        let tests = named(paragraph);
        if tests.is_empty() && !paragraph.ends_with(UNTRIED) {
            faults.push(format!("no test: {paragraph}"));
        }
        for test in tests {
            count += 1;
            if !exists(&test) {
                faults.push(format!("no such test: {test}"));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
    assert!(count > 20, "only {count} tests found");
    assert_eq!(text.matches(UNTRIED).count(), 1);
}
