#!/usr/bin/env bash
# Trains the $1000 model: depth 32, 1.9B parameters, 38B tokens, about 31 hours of pretraining on 8 H100s.
#
#     bash run1000.sh
#
# This is the largest tier of speedrun.sh, and continues in the same way. At the end it starts the chat page at
# http://localhost:8000; Ctrl-C ends it.

TIER=run1000 exec bash "$(dirname "$0")/speedrun.sh" "$@"
