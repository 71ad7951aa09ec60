#!/usr/bin/env bash
# `kdad score` on as many processes as KDAD_MODE and KDAD_PROCESSES say (launch/README.md).
set -euo pipefail
# shellcheck source=SCRIPTDIR/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "${launcher[@]}" -m kdad_dist score "$@"
