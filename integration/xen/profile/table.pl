#!/usr/bin/perl
# table.pl LOGS BIN: the tables of a profiled run, one for each job: instructions a request by symbol and backend.
#
# LOGS has, from the scenario: profile.plan (a line for each measurement: backend, job, requests between its second and
# third marker less those between the first and second), counts.N (see count.c), kallsyms, xensyms, guest.symbols,
# BACKEND.maps. BIN is the folder with the programs under test, not stripped.
#
# Dom0 has CPU 0 for itself and the guest CPU 1: this is how one kernel is told from the other.
use strict;
use warnings;
no warnings 'portable';

my ($logs, $bin) = @ARGV;
# A symbol is shown when it has this part of everything.
my $SHOWN = 1 / 2000;

# Sorted [address, name]; the last one before an address is the symbol of the address.
sub by_address { [sort { $a->[0] <=> $b->[0] } @{$_[0]}] }

sub lines_of {
    my ($file) = @_;
    open my $in, '<', $file or return;
    my @lines = <$in>;
    return @lines;
}

# kallsyms, xensyms and nm all write "address type name [module]".
sub symbols {
    my ($base, @lines) = @_;
    my @found;
    for (@lines) {
        next unless /^([0-9a-f]{8,16}) ([tTwWvVi]) (.*)/;
        push @found, [hex($1) + $base, $3];
    }
    return by_address(\@found);
}

sub find {
    my ($table, $address) = @_;
    my ($low, $high) = (0, scalar @$table);
    while ($low < $high) {
        my $middle = int(($low + $high) / 2);
        if ($table->[$middle][0] <= $address) { $low = $middle + 1 } else { $high = $middle }
    }
    return $low ? $table->[$low - 1] : undef;
}

my @kernel = grep { !/\[/ } lines_of("$logs/kallsyms");
my $dom0_kernel = symbols(0, lines_of("$logs/kallsyms"));
my $guest_kernel = symbols(0, @kernel, lines_of("$logs/guest.symbols"));
my $xen = symbols(0, lines_of("$logs/xensyms"));

# The executable mappings of a backend's process: [start, end, file, table of symbols or undef].
sub mappings {
    my ($backend) = @_;
    my (@maps, %base);
    for (lines_of("$logs/$backend.maps")) {
        my ($start, $end, $mode, $offset, $file) = /^([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) \S+ \d+\s+(\S+)/ or next;
        $base{$file} = hex $start unless exists $base{$file};
        next unless $mode =~ /x/;
        (my $name = $file) =~ s{.*/}{};
        my $program = "$bin/$name";
        my @nm = -e $program ? `nm -C --defined-only $program` : ();
        push @maps, [hex $start, hex $end, $name, symbols($base{$file}, @nm)];
    }
    return \@maps;
}

# place CPU ADDRESS MAPS: ("where", "symbol", address of the symbol).
sub place {
    my ($cpu, $address, $maps) = @_;
    if ($address >= hex 'ffff820000000000' && $address < hex 'ffff880000000000') {
        my $symbol = find($xen, $address);
        return ($cpu ? 'Xen, guest CPU' : 'Xen, dom0 CPU', $symbol ? $symbol->[1] : '?', $symbol ? $symbol->[0] : 0);
    }
    if ($address >= hex 'ffff880000000000') {
        my $symbol = find($cpu ? $guest_kernel : $dom0_kernel, $address);
        return ($cpu ? 'guest kernel' : 'dom0 kernel', $symbol ? $symbol->[1] : '?', $symbol ? $symbol->[0] : 0);
    }
    return ('guest user', 'fio and libraries', 0) if $cpu;
    for (@$maps) {
        my ($start, $end, $name, $table) = @$_;
        next if $address < $start || $address >= $end;
        my $symbol = find($table, $address);
        return ($name, $symbol ? ($symbol->[1], $symbol->[0]) : ('(no symbols)', 0));
    }
    # QEMU translates a page of a library once, with the address that the first program has it at.
    return ('dom0 user', 'libraries', 0);
}

# counts N: {"address instructions"} = [executions by CPU].
sub counts {
    my ($n) = @_;
    my %counts;
    open my $in, '<', "$logs/counts.$n" or die "counts.$n: $!\n";
    while (<$in>) {
        my ($address, $instructions, @executions) = split;
        $counts{"$address $instructions"} = \@executions;
    }
    return \%counts;
}

# measurement FIRST: what the three snapshots from FIRST on say was executed for the difference in requests.
sub measurement {
    my ($first) = @_;
    my ($before, $between, $after) = map { counts($first + $_) } 0 .. 2;
    my @result;
    for my $key (keys %$after) {
        my ($address, $instructions) = split ' ', $key;
        for my $cpu (0, 1) {
            my ($a, $b, $c) = map { exists $_->{$key} ? $_->{$key}[$cpu] : 0 } $before, $between, $after;
            my $executions = ($c - $b) - ($b - $a);
            push @result, [$cpu, hex $address, $instructions, $executions] if $executions;
        }
    }
    return \@result;
}

my (%jobs, @order, @backends, %seen);
my $marker = 1;
for (lines_of("$logs/profile.plan")) {
    my ($backend, $job, $requests) = split;
    my $maps = mappings($backend);
    push @backends, $backend unless $seen{$backend}++;
    push @order, $job unless $seen{"job $job"}++;
    for (@{measurement($marker)}) {
        my ($cpu, $address, $instructions, $executions) = @$_;
        my ($where, $symbol, $start) = place($cpu, $address, $maps);
        my $entry = $jobs{$job}{$where}{$symbol}{$backend} ||= [0, 0];
        $entry->[0] += $executions * $instructions / $requests;
        $entry->[1] += $executions / $requests if $address == $start;
    }
    $marker += 3;
}

sub row {
    my ($where, $symbol, $entries, $calls) = @_;
    printf '%-16s', $where;
    for (@backends) {
        my $entry = $entries->{$_};
        printf ' %10s', $entry ? sprintf('%.1f', $entry->[0]) : '';
        printf ' %8s', $calls && $entry && $entry->[1] ? sprintf('%.3f', $entry->[1]) : '';
    }
    print "  $symbol\n";
}

sub most {
    my ($entries) = @_;
    my ($most) = sort { $b <=> $a } map { $_->[0] } values %$entries;
    return $most;
}

for my $job (@order) {
    my (@rows, %where, %total);
    for my $where (keys %{$jobs{$job}}) {
        for my $symbol (keys %{$jobs{$job}{$where}}) {
            my $entries = $jobs{$job}{$where}{$symbol};
            push @rows, [$where, $symbol, $entries];
            for my $backend (keys %$entries) {
                $_->{$backend}[0] += $entries->{$backend}[0] for $where{$where} ||= {}, \%total;
            }
        }
    }
    print "\n== $job: instructions a request (and calls of the symbol a request)\n";
    printf '%-16s', '';
    printf ' %10s %8s', $_, 'calls' for @backends;
    print "\n";
    row('everything', '', \%total);
    row($_, '(all)', $where{$_}) for sort { most($where{$b}) <=> most($where{$a}) } keys %where;
    print "\n";
    @rows = sort { most($b->[2]) <=> most($a->[2]) } @rows;
    row(@$_, 1) for grep { most($_->[2]) >= $SHOWN * most(\%total) } @rows;
}
