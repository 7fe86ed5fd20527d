# Sourced by test_vllm.sh and test_trl.sh: packages that the common environment cannot hold, in one on top of it.
# beside BASE VENV PIP_ARGUMENTS.. makes VENV, which finds everything of the environment BASE and these packages first.
# It is made again when BASE's setup or the arguments (files of requirements by content) have changed.
beside() {
    local base=$1 venv=$2 wanted
    shift 2
    wanted="$(cat "$base/.future_l1_setup") $* $(for word in "$@"; do [[ -f $word ]] && cat "$word"; done; true)"
    if [[ ! -f $venv/.future_l1_beside || $(<"$venv/.future_l1_beside") != "$wanted" ]]; then
        printf '[%s] making %s\n' "$(basename "$0" .sh)" "$venv"
        rm -rf "$venv"
        "$base/bin/python" -m venv --without-pip "$venv"
        site() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }
        echo "import site; site.addsitedir('$(site "$base/bin/python")')" >"$(site "$venv/bin/python")/zz_base.pth"
        "$base/bin/python" -m pip --python "$venv/bin/python" --disable-pip-version-check -qq install --no-deps "$@"
        echo "$wanted" >"$venv/.future_l1_beside"
    fi
}
