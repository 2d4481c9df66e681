#!/bin/sh
# Run by dracut's initial programs before udev starts.
/usr/libexec/vfiod-early > /dev/kmsg
