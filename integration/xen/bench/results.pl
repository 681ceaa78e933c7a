#!/usr/bin/perl
# results.pl ROWS JSON: prints the comparison of the measured rows, with ratios, and writes it as JSON.
#
# ROWS has a line for each row: its name and the IOPS of the five jobs.
use strict;
use warnings;

my ($rows, $json) = @ARGV;
my @JOBS = qw(rr4k_qd1 rr4k_qd32 rw4k_qd32 sr1m_qd4 sw1m_qd4);
# Each row is compared with the first one of these that was measured: another backend on the same kind of disk.
my %PEERS = (
    'xenio-copy' => ['blkback-copy', 'blkback'],
    'xenio-pvh' => ['blkback-pvh', 'blkback'],
    'xenio-raw-ram' => [],
    'xenio-vhd' => ['xenio-raw-ram'],
    'xenio-raw-file' => ['qdisk-raw-file'],
    'xenio-vhd-file' => ['qdisk-vhd-file'],
    'qdisk-raw-file' => [],
    'qdisk-vhd-file' => [],
);

my (@names, %iops);
open my $in, '<', $rows or die "$rows: $!\n";
while (<$in>) {
    my ($name, @values) = split;
    die "$rows: a row without five figures: $_" unless @values == @JOBS;
    push @names, $name;
    $iops{$name} = \@values;
}

sub peer_of {
    my ($name) = @_;
    my @peers = $PEERS{$name} ? @{$PEERS{$name}} : ('blkback');
    return (grep { $iops{$_} && $_ ne $name } @peers)[0];
}

printf "\n%-32s %9s %9s %9s %9s %9s\n", 'IOPS, 1 instruction = 1 ns', @JOBS;
printf "%-32s %9d %9d %9d %9d %9d\n", $_, @{$iops{$_}} for @names;
print "\n";
for my $name (@names) {
    my $peer = peer_of($name) or next;
    my @ratios = map { $iops{$peer}[$_] ? $iops{$name}[$_] / $iops{$peer}[$_] : 0 } 0 .. $#JOBS;
    printf "%-32s %9.2f %9.2f %9.2f %9.2f %9.2f\n", "$name / $peer", @ratios;
}

my $text = join ', ', map {
    my $name = $_;
    "\"$name\": {" . join(', ', map { "\"$JOBS[$_]\": $iops{$name}[$_]" } 0 .. $#JOBS) . '}';
} @names;
open my $out, '>', $json or die "$json: $!\n";
print $out "{\"rows\": {$text}}\n";
close $out or die "$json: $!\n";
