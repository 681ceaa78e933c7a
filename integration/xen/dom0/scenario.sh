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
. "/testbed/scenarios/$1.sh"
