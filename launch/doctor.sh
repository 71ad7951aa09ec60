#!/usr/bin/env bash
# Whether as many processes as KDAD_MODE and KDAD_PROCESSES say meet, and how fast they exchange numbers.
set -euo pipefail
# shellcheck source=SCRIPTDIR/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
exec "${launcher[@]}" -m kdad_dist doctor "$@"
