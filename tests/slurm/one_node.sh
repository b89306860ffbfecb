#!/bin/bash
# A Slurm of one node on this machine, for trying the grid on a cluster: `sudo tests/slurm/one_node.sh start`, later `… stop`.
# Needs Debian's packages: apt-get install slurm-wlm munge
set -euo pipefail
HERE=${SLURM_ONE_NODE:-/tmp/slurm-one-node}
export SLURM_CONF=/etc/slurm/slurm.conf   # jobs look there, whatever the environment of the submitting shell

start() {
    [ ! -e "$SLURM_CONF" ] || { echo "$SLURM_CONF exists: this machine has a Slurm of its own." >&2; exit 1; }
    for tool in slurmctld slurmd munged; do command -v $tool >/dev/null || { echo "$tool is missing: apt-get install slurm-wlm munge" >&2; exit 1; }; done
    mkdir -p "$HERE"/{state,spool} /run/munge /etc/slurm
    [ -s /etc/munge/munge.key ] || { install -d -o munge -m 700 /etc/munge; dd if=/dev/urandom bs=1024 count=1 of=/etc/munge/munge.key status=none; }
    chown munge: /etc/munge/munge.key /run/munge; chmod 400 /etc/munge/munge.key; chmod 755 /run/munge
    pgrep -x munged >/dev/null || runuser -u munge -- munged
    cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$(hostname -s)
SlurmUser=root
StateSaveLocation=$HERE/state
SlurmdSpoolDir=$HERE/spool
SlurmctldPidFile=$HERE/slurmctld.pid
SlurmdPidFile=$HERE/slurmd.pid
SlurmctldLogFile=$HERE/slurmctld.log
SlurmdLogFile=$HERE/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MinJobAge=300
NodeName=$(hostname -s) CPUs=$(nproc) RealMemory=$(( $(awk '/MemTotal/ {print $2}' /proc/meminfo)*9/10240 )) State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    slurmctld && slurmd
    for _ in $(seq 30); do [ "$(sinfo -h -o %t 2>/dev/null)" = idle ] && break; sleep 1; done
    sinfo
    echo "Slurm is up: codegpt-nbc reproduce smoke --cluster configs/slurm"
}

stop() {
    for name in slurmd slurmctld; do [ -f "$HERE/$name.pid" ] && kill "$(cat "$HERE/$name.pid")" || true; done
    sleep 2; rm -rf "$HERE" "$SLURM_CONF"
}

case ${1:-} in start|stop) "$1" ;; *) echo "usage: $0 start|stop" >&2; exit 2 ;; esac
