#!/bin/sh
# Fetches a model's files into $TARGET, each checked against its SHA-256 where one is given. Run by an init container of
# every pod that shares the volume, so several may run at once: each fetches into a directory of its own, and the first
# that is done renames it, which is one step. What is there already is not fetched again.
#
# $FILES lists them, a line each: the name, a space, the SHA-256 or `-`. $FROM says how a name becomes a URL.
set -eu

if [ -d "$TARGET" ]; then
    echo "$TARGET is there already"
    exit 0
fi
partial="$TARGET.partial.$(hostname)"
rm -rf "$partial"
mkdir -p "$partial"

fetch() { # URL FILE
    set -- --fail --location --retry 8 --retry-connrefused --silent --show-error --output "$2" "$1"
    case "$FROM" in
    # Secrets go by standard input: a command line can be read by others.
    hub) [ -z "${TOKEN:-}" ] || set -- --config - "$@"
         printf 'header = "Authorization: Bearer %s"\n' "${TOKEN:-}" | curl "$@" ;;
    s3) printf 'user = "%s:%s"\n' "$AWS_ACCESS_KEY_ID" "$AWS_SECRET_ACCESS_KEY" |
            curl --config - --aws-sigv4 "aws:amz:$REGION:s3" "$@" ;;
    *) curl "$@" ;;
    esac
}

while read -r name sha256; do
    case "$FROM" in
    hub) url="$ENDPOINT/$REPOSITORY/resolve/$REVISION/$name" ;;
    s3) url="$ENDPOINT/$REPOSITORY/$name" ;;
    *) url="$ENDPOINT/$name" ;;
    esac
    echo "fetching $url"
    fetch "$url" "$partial/$name" </dev/null
    if [ "$sha256" != - ]; then
        echo "$sha256  $partial/$name" | sha256sum -c -
    fi
done <"$FILES"

# Of two that are done at once the second finds the name taken.
if [ -d "$TARGET" ] || ! mv -T "$partial" "$TARGET"; then
    rm -rf "$partial"
    [ -d "$TARGET" ]
fi
echo "$TARGET is complete"
