#!/bin/bash
# Becomes systemd, PID 1 of the namespaces that `unshare --pid --mount ...` has made, over a throw-away view of this
# machine's files: boot_systemd.sh SCRATCH VENV PYTHON_PREFIX UNIT_FOLDER ENVIRONMENT_FILE
#
# Nothing is written outside SCRATCH. Of the units of a boot only the journal is kept: the others would set up the
# kernel of the machine the tests run on.
set -euo pipefail
scratch=$1 venv=$2 prefix=$3 units=$4 environment=$5
mount --make-rprivate /
mount -t tmpfs tmpfs "$scratch"
mkdir "$scratch"/{up,work,root,venv-up,venv-work}
mount -t overlay overlay -o "lowerdir=/,upperdir=$scratch/up,workdir=$scratch/work" "$scratch/root"
cd "$scratch/root"

# The installed server where the unit looks for it. Its Python is moved too: ProtectHome hides /root and /home.
mkdir -p opt/step-oracle opt/python etc/step-oracle
mount --bind "$prefix" opt/python
mount -t overlay overlay -o "lowerdir=$venv,upperdir=$scratch/venv-up,workdir=$scratch/venv-work" opt/step-oracle
ln -sf /opt/python/bin/python3 opt/step-oracle/bin/python
sed -i 's|^home = .*|home = /opt/python/bin|' opt/step-oracle/pyvenv.cfg
sed -i '1s|.*|#!/opt/step-oracle/bin/python|' opt/step-oracle/bin/step-oracle
cp "$environment" etc/step-oracle/step-oracle.env
cp -R "$units"/. etc/systemd/system/

find etc/systemd/system lib/systemd/system -path '*.wants/*' ! -name 'systemd-journald.s*' -delete
mount -t proc proc proc
mount --rbind /dev dev
mount --rbind /sys sys
mount -t tmpfs tmpfs run
# The hierarchies the unit needs, and no others.
mount -t tmpfs tmpfs sys/fs/cgroup
mkdir sys/fs/cgroup/systemd sys/fs/cgroup/memory
mount -t cgroup -o none,name=systemd,xattr cgroup sys/fs/cgroup/systemd
mount -t cgroup -o memory cgroup sys/fs/cgroup/memory
# Not chroot: a process in one may make no user namespace, as PrivateUsers needs.
mkdir old
pivot_root . old
umount --lazy old
export container=step-oracle-tests
exec /lib/systemd/systemd --system --unit=basic.target --log-target=journal
