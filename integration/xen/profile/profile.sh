# What a profiled boot needs from the host: the counting plugin, the marker program, and the table made afterwards.
# shellcheck shell=bash

# prepare_profile: for a boot with "# machine: profiled". Sets $COUNTER; the machine finds the marker in its payload.
prepare_profile() {
    COUNTER=$CACHE/count.so
    mkdir -p "$PAYLOAD/profile"
    cc -O2 -Wall -Wextra -Werror -shared -fPIC -fvisibility=hidden -o "$COUNTER" "$HERE/profile/count.c"
    cc -nostdlib -static -o "$PAYLOAD/profile/mark" "$HERE/profile/mark.S"
}

# profile_tables: the table of each job, from what the machine left in $LOGS, and into $LOGS/../profile.txt.
profile_tables() {
    [ -s "$LOGS/profile.plan" ] || return 0
    perl "$HERE/profile/table.pl" "$LOGS" "$BIN" | tee "$CACHE/profile.txt"
}
