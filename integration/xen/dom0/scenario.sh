#!/bin/bash
# scenario.sh NAME: one scenario, with the helpers of lib.sh and an empty work folder.
set -euo pipefail
. /testbed/dom0/lib.sh
. /testbed/parameters
rm -rf "$WORK"
mkdir -p "$WORK"
cd "$WORK"
exec {BASH_XTRACEFD}>trace.log
set -x
trap 'echo "FAILED: line $LINENO of $1: $BASH_COMMAND (status $?)"' ERR
echo "scenario $1 begins" >/dev/kmsg
. "/testbed/scenarios/$1.sh"
# What a program did wrong with the memory of guests shows here first, and in other scenarios later.
! dmesg | sed "1,/scenario $1 begins/d" | grep -E 'BUG: |WARNING: CPU|Oops|Bad page' || fail "dom0's kernel complains"
