#!/bin/sh
# Fetches a model's files into $BASE-$PIN, each checked against its SHA-256 where one is given. $PIN stands for everything
# that says what is fetched, so another version gets a place of its own beside the one that nodes still read.
#
# Run by an init container of every pod that shares the volume. One of them fetches, under a lock with a lease; the others
# wait. The lock saves work only: what is fetched gets its name by one rename, so two that fetch at once do no harm.
#
# $FILES lists the files, a line each: the name, a space, the SHA-256 or `-`. $FROM says how a name becomes a URL. With
# $CONVERT the files are a checkpoint that the next init container makes the model of.
set -eu

model="$BASE-$PIN"
target="$model${CONVERT:+.fetched}"
lock="$BASE.lock"
me="$POD_NAME"
lease="${LEASE:-60}"
# A pod that converts gives no signs of life, since its image has no shell to give them by.
convert_lease=3600
beating=""

say() {
    echo "fetch-weights: $*"
}

# The lock: a directory, which only one can make. `owner` says whose it is, `beat` changes while that one lives. Clocks of
# machines differ, so nobody compares times: a lock is stale when its beat has not changed for a lease of the waiter's.

beat() { # every few seconds, as long as the process that fetches lives
    count=0
    while kill -0 $$ 2>/dev/null && [ "$(cat "$lock/owner" 2>/dev/null)" = "$me" ]; do
        count=$((count + 1))
        echo "$me $count" >"$lock/beat"
        sleep "$((lease / 12 + 1))"
    done
}

hold() {
    echo "$me" >"$lock/owner"
    rm -f "$lock/converts"
    beat >/dev/null 2>&1 &
    beating=$!
    trap release EXIT
    trap 'exit 143' TERM INT
}

release() {
    [ -z "$beating" ] || kill "$beating" 2>/dev/null || true
    [ "$(cat "$lock/owner" 2>/dev/null)" != "$me" ] || rm -rf "$lock"
}

state() {
    cat "$lock/owner" "$lock/beat" "$lock/converts" 2>/dev/null || true
}

acquire() { # 0: the lock is ours; 1: somebody else has fetched the model meanwhile
    waited=0
    seen=""
    while ! mkdir "$lock" 2>/dev/null; do
        [ ! -d "$model" ] || return 1
        now="$(state)"
        converts="$(cat "$lock/converts" 2>/dev/null || true)"
        limit="$lease"
        [ -z "$converts" ] || limit="$convert_lease"
        # Its own, when a container starts again; or of somebody who has converted and is done.
        if [ "$(cat "$lock/owner" 2>/dev/null)" = "$me" ] || { [ -n "$converts" ] && [ -d "$converts" ]; }; then
            waited="$limit"
        elif [ "$now" != "$seen" ]; then
            [ -n "$seen" ] || say "waiting for the pod that fetches: $now"
            waited=0
            seen="$now"
        fi
        if [ "$waited" -ge "$limit" ]; then
            say "taking over a lock without a sign of life: $now"
            # Only one can rename it.
            mv "$lock" "$lock.stale.$me.$$" 2>/dev/null && rm -rf "$lock.stale.$me.$$"
        elif [ ! -d "$lock" ] && [ ! -w "$(dirname "$lock")" ]; then
            say "cannot write to $(dirname "$lock")" >&2
            exit 1
        else
            sleep 1
            waited=$((waited + 1))
        fi
    done
    hold
    [ ! -d "$model" ]
}

# Fetching.

s3_credentials() { # from the environment, or by the pod's identity
    if [ -n "${AWS_ACCESS_KEY_ID:-}" ]; then
        return
    elif [ -n "${AWS_WEB_IDENTITY_TOKEN_FILE:-}" ]; then
        answer="$(curl --fail --silent --show-error --retry 5 --request POST \
            --data-urlencode "Action=AssumeRoleWithWebIdentity" --data-urlencode "Version=2011-06-15" \
            --data-urlencode "RoleArn=$AWS_ROLE_ARN" --data-urlencode "RoleSessionName=sida" \
            --data-urlencode "WebIdentityToken@$AWS_WEB_IDENTITY_TOKEN_FILE" \
            "${AWS_ENDPOINT_URL_STS:-https://sts.$REGION.amazonaws.com}/" | tr '<' '\n')"
        field() { echo "$answer" | sed -n "s/^$1>//p"; }
        AWS_ACCESS_KEY_ID="$(field AccessKeyId)"
        AWS_SECRET_ACCESS_KEY="$(field SecretAccessKey)"
        AWS_SESSION_TOKEN="$(field SessionToken)"
    elif [ -n "${AWS_CONTAINER_CREDENTIALS_FULL_URI:-}" ]; then
        answer="$(printf 'header = "Authorization: %s"\n' "$(cat "$AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")" |
            curl --fail --silent --show-error --retry 5 --config - "$AWS_CONTAINER_CREDENTIALS_FULL_URI" | tr ',{}' '\n\n\n')"
        field() { echo "$answer" | sed -n "s/^ *\"$1\" *: *\"\(.*\)\" *$/\1/p"; }
        AWS_ACCESS_KEY_ID="$(field AccessKeyId)"
        AWS_SECRET_ACCESS_KEY="$(field SecretAccessKey)"
        AWS_SESSION_TOKEN="$(field Token)"
    else
        return 0
    fi
    [ -n "$AWS_ACCESS_KEY_ID" ] || { say "no credentials in the answer" >&2; exit 1; }
}

# Secrets go by standard input: a command line can be read by others.
secrets() {
    case "$FROM" in
    hub) [ -z "${TOKEN:-}" ] || printf 'header = "Authorization: Bearer %s"\n' "$TOKEN" ;;
    s3)
        [ -z "${AWS_ACCESS_KEY_ID:-}" ] || printf 'user = "%s:%s"\naws-sigv4 = "aws:amz:%s:s3"\n' "$AWS_ACCESS_KEY_ID" "$AWS_SECRET_ACCESS_KEY" "$REGION"
        [ -z "${AWS_SESSION_TOKEN:-}" ] || printf 'header = "x-amz-security-token: %s"\n' "$AWS_SESSION_TOKEN"
        ;;
    esac
}

url_of() {
    case "$FROM" in
    hub) echo "$ENDPOINT/$REPOSITORY/resolve/$REVISION/$1" ;;
    s3) echo "$ENDPOINT/$REPOSITORY/$1" ;;
    *) echo "$ENDPOINT/$1" ;;
    esac
}

check() { # DIRECTORY: every file that has a SHA-256
    echo "$FILES" | while read -r name sha256; do
        [ -z "$name" ] || [ "$sha256" = - ] || echo "$sha256  $1/$name" | sha256sum -c -
    done
}

fetch() {
    partial="$(mktemp -d "$model.partial.XXXXXX")"
    chmod 0755 "$partial"
    [ "$FROM" != s3 ] || s3_credentials
    echo "$FILES" | while read -r name sha256; do
        [ -n "$name" ] || continue
        say "$(url_of "$name")"
        secrets | curl --config - --fail --location --retry 8 --retry-connrefused --silent --show-error \
            --output "$partial/$name" "$(url_of "$name")"
        [ "$sha256" = - ] || echo "$sha256  $partial/$name" | sha256sum -c -
    done
    # Of two that are done at once the second finds the name taken.
    mv -T "$partial" "$target" 2>/dev/null || { rm -rf "$partial" && [ -d "$target" ]; }
}

# What lies on the volume under our name with a pin and an ending, the newest first. Others may have names that begin alike.
ours() { # REGULAR-EXPRESSION
    name="$(basename "$BASE")"
    ls -1dt "$BASE"-* "$(dirname "$BASE")/.$name"-* 2>/dev/null | grep -E "/\.?$name-[0-9a-f]{12}$1\$" || true
}

# What is left of those that died while they fetched or converted, and copies beyond those that stay, the oldest first.
tidy() {
    for left in $(ours '\.partial\..*') $(ours '\.[0-9a-f]{16}\.partial') $(ours '\.fetched'); do
        [ "$left" = "$target" ] || rm -rf "$left"
    done
    kept=1
    for copy in $(ours ''); do
        kept=$((kept + 1))
        [ "$kept" -le "${KEEP:-2}" ] || rm -rf "$copy"
    done
}

mkdir -p "$(dirname "$BASE")"
if [ -d "$model" ] || ! acquire; then
    say "$model is there already"
    # What the model was made of is of no more use, nor is the lock of who made it.
    [ -z "${CONVERT:-}" ] || rm -rf "$target"
    [ "$(cat "$lock/converts" 2>/dev/null)" != "$model" ] || rm -rf "$lock"
    [ -z "${VERIFY:-}" ] || check "$model"
    exit 0
fi
tidy
[ -d "$target" ] || fetch
say "$target is complete"
if [ -n "${CONVERT:-}" ]; then
    # The lock stays until the model is there.
    echo "$model" >"$lock/converts"
    trap - EXIT
    kill "$beating" 2>/dev/null || true
fi
