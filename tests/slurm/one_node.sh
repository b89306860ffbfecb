#!/bin/bash
# A Slurm of one node, run by an ordinary user for one command, for trying the grid on a cluster:
#     tests/slurm/one_node.sh codegpt-nbc reproduce smoke --cluster configs/slurm
# Needs Debian's packages: apt-get install slurm-wlm munge
set -euo pipefail
[ $# -gt 0 ] || { echo "usage: $0 COMMAND …" >&2; exit 2; }
for tool in slurmctld slurmd munged; do command -v $tool >/dev/null || { echo "$tool is missing: apt-get install slurm-wlm munge" >&2; exit 1; }; done

here=$(mktemp -d)
export SLURM_CONF=$here/slurm.conf
stop() {
    scancel --me 2>/dev/null && sleep 2 || true
    for name in slurmd slurmctld munged; do [ ! -s "$here/$name.pid" ] || kill "$(cat "$here/$name.pid")" || true; done
    sleep 2; rm -rf "$here"
}
trap stop EXIT

mkdir "$here"/{bin,state,spool}
for tool in sbatch scancel sinfo squeue srun; do   # Snakemake clears SLURM_* in its jobs, so the commands carry the configuration themselves
    printf '#!/bin/sh\nSLURM_CONF=%s exec %s "$@"\n' "$SLURM_CONF" "$(command -v $tool)" >"$here/bin/$tool"; chmod +x "$here/bin/$tool"
done
export PATH=$here/bin:$PATH
mungekey --create --keyfile="$here/munge.key"
munged --force --socket="$here/munge.socket" --key-file="$here/munge.key" --pid-file="$here/munged.pid" --seed-file="$here/munged.seed" --log-file="$here/munged.log"
cat >"$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$(hostname -s)
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthInfo=socket=$here/munge.socket
CredType=cred/munge
StateSaveLocation=$here/state
SlurmdSpoolDir=$here/spool
SlurmctldPidFile=$here/slurmctld.pid
SlurmdPidFile=$here/slurmd.pid
SlurmctldLogFile=$here/slurmctld.log
SlurmdLogFile=$here/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
MinJobAge=300
NodeName=$(hostname -s) CPUs=$(nproc) RealMemory=$(free -m | awk '/^Mem/ {print int($2*0.9)}') State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
slurmctld && slurmd
for _ in $(seq 30); do [ "$(sinfo -h -o %t 2>/dev/null)" != idle ] || break; sleep 1; done
sinfo
"$@"
