# compare REPOSITORY SUMS
export LC_ALL=C
cd "$1"
# A letter for the kind of each: files, no links.
cut -c67- "$2" | sed 's/^/f /' | sort > /tmp/expected
find . ! -type d -printf '%y %P\n' | sort > /tmp/found
diff /tmp/expected /tmp/found || { echo "$1: not the files of $2 (<: missing, >: added)" >&2; exit 1; }
sha256sum --check --strict --quiet "$2"
