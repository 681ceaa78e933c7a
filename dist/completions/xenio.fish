# Completion for the tools of xenio in fish; installed under the name of each tool. Commands and options are those that the
# program itself tells of.

function __xenio_commands --argument-names program
    $program --help 2>/dev/null | sed -n \
        -e 's/^  \([a-z][a-z-]*\).*/\1/p' \
        -e "s/^$program \([a-z][a-z-]*\) .*/\1/p" \
        -e '/^COMMAND :=/{s/^[^{]*{ *//;s/ *}.*//;s/ *| */\n/g;p}'
end

# The options of the command that has been typed.
function __xenio_options
    set --local words (commandline --tokenize --current-process --cut-at-cursor)
    set --query words[2]; or return
    begin
        if test $words[1] = tap-img
            tap-img --help
        else
            $words[1] $words[2] -h
        end
    end 2>/dev/null | string match --all --regex --groups-only -- '(?:^|[\s<(\[|])(-[0-9A-Za-z]|--[a-z][a-z-]*)(?=$|[\s>)\]|,:=])' | sort --unique
end

# What tap-ctl's list says in the field: pid or minor.
function __xenio_disks --argument-names field
    tap-ctl list 2>/dev/null | string match --regex --groups-only -- "$field=(\d+).* args=(.*)" | paste - -
end

function __xenio_types
    printf '%s:\n' aio sync vhd qcow qcow2 vmdk nbd ram x-chain null
end

for program in tap-ctl vhd-util cbt-util tap-img
    complete --command $program --condition __fish_use_subcommand --no-files --arguments "(__xenio_commands $program)"
    complete --command $program --condition 'not __fish_use_subcommand' --arguments '(__xenio_options)'
end
complete --command tap-ctl --short-option p --no-files --require-parameter --arguments '(__xenio_disks pid)'
complete --command tap-ctl --short-option m --no-files --require-parameter --arguments '(__xenio_disks minor)'
for option in a 2
    complete --command tap-ctl --old-option $option --require-parameter --arguments '(__xenio_types)'
end
complete --command tap-ctl --long-option engine --no-files --require-parameter --arguments 'uring pool auto'
for option in f F O
    complete --command tap-img --short-option $option --no-files --require-parameter --arguments 'raw vhd qcow qcow2 vmdk'
end
