#!/usr/bin/env bash
# Keeps the documents in step with the code, where a machine can tell:
#
# - the README shows the examples as they are: each fence after a line `<!-- file: PATH -->` equals that file (without its
#   leading `//!` comment);
# - every link to a file leads to one;
# - docs/architecture.md names every module of fs-core, and docs/on-disk-format.md every field of the superblock and of a
#   node's header; the tests that architecture.md names exist.

set -euo pipefail
export LC_ALL=C
cd "$(dirname "$0")/.."

BAD=0
complain() {
  printf '%s\n' "$*"
  BAD=1
}

# The first fence after the marker of $2 in document $1.
shown() {
  awk -v marker="<!-- file: $2 -->" '
    $0 == marker { found = 1; next }
    found && /^```/ { if (inside) exit; inside = 1; next }
    inside { print }' "$1"
}

# The file as a document shows it.
wanted() { awk '!begun && (/^\/\/!/ || /^$/) { next } { begun = 1; print }' "$1"; }

check_examples() {
  local document="$1" file
  while read -r file; do
    if [ ! -f "$file" ]; then
      complain "$document shows $file, which does not exist"
    elif ! diff -u --label "$file" --label "$document" <(wanted "$file") <(shown "$document" "$file"); then
      complain "$document does not show $file as it is"
    fi
  done < <(sed -n 's/^<!-- file: \(.*\) -->$/\1/p' "$document")
}

check_links() {
  local document="$1" link
  while read -r link; do
    case "$link" in http:* | https:* | '#'*) continue ;; esac
    [ -e "$(dirname "$document")/${link%%#*}" ] || complain "$document links to $link, which does not exist"
  done < <(grep -oE '\]\([^)[:space:]]+\)' "$document" | sed 's/^](//; s/)$//')
}

# Every name that `sed -n SCRIPT` finds in a source file stands in backquotes in the document.
check_names() {
  local document="$1" source="$2" script="$3" name
  while read -r name; do
    grep -qE "\`($name|$name::[a-z_]+|$name/)\`" "$document" || complain "$document does not mention \`$name\` of $source"
  done < <(sed -nE "$script" "$source")
}

for document in README.md docs/*.md; do
  check_examples "$document"
  check_links "$document"
done
for example in fs-core/examples/*.rs; do
  grep -qF -- "<!-- file: $example -->" README.md || complain "README.md does not show $example"
done
check_names docs/architecture.md fs-core/src/lib.rs 's/^(pub )?mod ([a-z_]+);$/\2/p'
for part in channel range_lock alloc tree extent_map records; do
  check_names docs/architecture.md "fs-core/src/$part/mod.rs" '/^#\[cfg\((all\()?test/{n;d}; s/^(pub |pub\(crate\) )?mod ([a-z_]+);$/\2/p'
done
check_names docs/on-disk-format.md fs-core/src/superblock.rs \
  '/^pub\(crate\) struct OnDisk/,/^}/ s/^ +pub\(crate\) ([a-z_]+): .*/\1/p'
check_names docs/on-disk-format.md fs-core/src/tree/node.rs '/^pub\(super\) struct Header/,/^}/ s/^ +pub\(super\) ([a-z_]+): .*/\1/p'

# What looks like the name of a test, in backquotes, is one.
# shellcheck disable=SC2016 # backquotes as such
while read -r name; do
  grep -rqE "fn $name\\b" --include='*.rs' fs-core bdev-adapter bench spdk-sys ||
    complain "docs/architecture.md names the test $name, which does not exist"
done < <(grep -oE '`[a-z0-9]+(_[a-z0-9]+){3,}`' docs/architecture.md | tr -d '`' | sort -u)

if [ "$BAD" -eq 0 ]; then echo "the documents are in step with the code"; fi
exit "$BAD"
