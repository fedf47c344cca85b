#!/bin/sh
# Gives numba the kernels that were compiled when the image was built, then becomes step-oracle.
#
# numba uses no cache in a folder it cannot write, and the root file system may be read-only; so the kernels are copied
# to a folder that can be written, named after their content: two versions of the image may share a volume. On a CPU
# that differs from the builder's they are compiled anew, once, and kept beside the others.
set -eu
seed="${NUMBA_CACHE_SEED:-/opt/step-oracle/numba-cache}"
parent="${NUMBA_CACHE_DIR:-/var/cache/step-oracle}"
cache="$parent/$(cat "$seed/key")"
if [ ! -d "$cache" ]; then
  if ! copy="$(mktemp -d "$parent/copying.XXXXXX" 2>&1)"; then
    echo "step-oracle: $parent cannot be written ($copy); mount a tmpfs or a volume there for user $(id -u)" >&2
    exit 1
  fi
  cp -R --preserve=timestamps "$seed/." "$copy/"
  # Another container may have been quicker; its copy is as good.
  mv -T "$copy" "$cache" 2>/dev/null || rm -rf "$copy"
fi
export NUMBA_CACHE_DIR="$cache"
exec step-oracle "$@"
