#!/bin/sh
# usage: no_weak_symbols.sh NM OBJECT...
# An inline function in an object compiled for one instruction set is a weak symbol, and the linker may keep that copy for
# the whole program, which then stops with an illegal instruction on an older processor. So these objects must have none.
nm=$1
shift
[ $# -gt 0 ] || { echo "no objects given"; exit 1; }
symbols=$("$nm" -C --defined-only "$@") || exit 1
found=$(printf '%s\n' "$symbols" | grep -E ' [WVu] ')
[ -z "$found" ] && { echo "$# objects, no weak symbols"; exit 0; }
echo "weak symbols in objects with their own instruction set:"
echo "$found"
exit 1
