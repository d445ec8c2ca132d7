#!/bin/sh
# Git hooks of this clone (run by `make hooks`): nbdev's merge and diff drivers, and a check of every commit's notebooks.
set -eu
venv=${VENV:-.venv}
cd "$(git rev-parse --show-toplevel)"
PATH="$venv/bin:$PATH" nbdev-install-hooks >/dev/null

# nbdev writes bare command names, which git finds only while the environment is active: name them by path instead.
git config --file .gitconfig merge.jupyternotebook.driver "$venv/bin/nbdev-merge %O %A %B %P"
git config --file .gitconfig diff.jupyternotebook.command "$venv/bin/nbdev-diff-driver"
hooks=$(git rev-parse --git-path hooks)
printf '#!/bin/sh\nexec %s/bin/nbdev-trust\n' "$venv" > "$hooks/post-merge"
cat > "$hooks/pre-commit" <<EOF
#!/bin/sh
exec $venv/bin/python scripts/check.py staged
EOF
chmod +x "$hooks/post-merge" "$hooks/pre-commit"
echo "The hooks are in place: a notebook that is not clean is refused at commit; notebooks merge cell by cell."
